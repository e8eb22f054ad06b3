"""Messages: no secret in them, and nothing that a terminal obeys."""

from __future__ import annotations

import pytest

from electra_wrap.errors import mask, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hunter2@host/x; correct it", "https://me:***@host/x; correct it"),
        ("https://me:${PASSWORD}@host/x", "https://me:${PASSWORD}@host/x"),
        ("https://${USER}:${PASSWORD}@host/x", "https://${USER}:${PASSWORD}@host/x"),
        ("https://me:${A}real@host/x", "https://me:***@host/x"),
        ("https://me:p@ss@host/x", "https://me:***@host/x"),
        ("'https://hunter2@host/x'", "'https://***@host/x'"),
        ("HTTPS://hunter2@host:80/x", "HTTPS://***@host:80/x"),
        ("s3://id:hunter2@bucket/x", "s3://id:***@bucket/x"),
        ("abfs://container@account/x", "abfs://container@account/x"),
        ("data://abcdefghijkl@account/x", "data://***@account/x"),
        ("data://${SECRET_TOKEN_NAME}@account/x", "data://${SECRET_TOKEN_NAME}@account/x"),
        ("hf://datasets/ana/textos@main:a:b", "hf://datasets/ana/textos@main:a:b"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("http://h/x?accessToken=abcdefghijkl&a=1", "http://h/x?accessToken=***&a=1"),
        ("'http://h/x?jwt=abcdefghijklmnop': no", "'http://h/x?jwt=***': no"),
        ("http://h/x#authkey=abcdefghijklmnop", "http://h/x#authkey=***"),
        ("http://h/x?abcdefghijklmnop", "http://h/x?***"),
        ("http://h/x?k=${SECRET_TOKEN_NAME}", "http://h/x?k=${SECRET_TOKEN_NAME}"),
        ("http://h/x?k=${A}0123456789", "http://h/x?k=***"),
        ("http://h/x?lines=1&file=es.txt.gz", "http://h/x?lines=1&file=es.txt.gz"),
        ("http://h/a b?k=0123456789012345", "http://h/a b?k=***"),
        ("http:/h/x?k=0123456789012345", "http:/h/x?k=***"),
        ("is it a?b=0123456789012345", "is it a?b=0123456789012345"),
    ],
)
def test_secrets_in_urls_are_masked(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_long_message_has_its_beginning_and_its_end() -> None:
    shown = printable("corpus.source = " + "x" * 100_000 + " is wrong; correct it")
    assert len(shown) < 1600
    assert shown.startswith("corpus.source = x") and shown.endswith("x is wrong; correct it")


def test_message_is_one_line_without_control_characters() -> None:
    text = "año\x1b[31m\n\r\x9b2J\u202enoche \U0001f642"
    assert printable(text) == "año\ufffd[31m\ufffd\ufffd\ufffd2J\ufffdnoche \U0001f642"
