"""The stages from text to model, and what runs them."""
