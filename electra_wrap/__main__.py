"""`python -m electra_wrap`. A signal gives one line, also while modules are being imported."""

from electra_wrap import signals


def main() -> None:
    """Run the command line."""
    signals.exit_at_once()
    from electra_wrap.cli import entry_point

    entry_point()


if __name__ == "__main__":
    main()
