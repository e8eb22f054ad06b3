"""Collect Spanish text from the documentation, translations and texts in Debian's packages.

    python examples/spanish_text.py

writes `examples/text/train/PACKAGE.txt`, for pre-training, and `examples/text/held-out.txt`, for
tasks whose documents the model must not have seen. A line is a sentence, and blank lines separate
documents. Each sentence is there once.

It downloads 0.75 GB of packages and installs none, and needs Debian or Ubuntu. The texts have the
licenses of their packages.
"""

import argparse
import bz2
import gettext
import gzip
import hashlib
import html
import io
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = """
    libreoffice-help-es libreoffice-l10n-es lilypond-doc-html-es gimp-help-es gimp-data inkscape
    inkscape-tutorials manpages-es manpages-es-dev debian-reference-es debian-handbook
    installation-guide-amd64 debian-edu-doc-es debian-history maint-guide-es aptitude-doc-es
    aptitude-common apt-doc dpkg po4a live-manual-html freedombox-doc-es
    ubuntu-packaging-guide-html-es gnome-user-docs evolution-common gedit-common evince-common
    rhythmbox-data brasero-common aisleriot shotwell-common orca anjuta-common
    epiphany-browser-data gnucash-common gnumeric-common gramps kmail korganizer khelpcenter
    kate5-data kdenlive-data kmymoney-common kstars-data digikam-data okular dolphin
    plasma-desktop-data kalzium-data kig kturtle cantor calibre audacity-data darktable
    lyx-common gnupg-l10n coreutils git vim-runtime wxmaxima wordpress-l10n phpmyadmin
    lincity-ng-data wesnoth-1.16-data freeciv-data crawl-common fortunes-es sword-text-sparv
""".split()

SPANISH_PATH = re.compile(r"[/._-](?:es|spaRV1909eb)(?:[/._-]|$)")
#: Share of the documents that is held out; a hash of the name decides.
HELD_OUT = 0.08

#: Elements of HTML, DocBook, Mallard and SVG that begin a paragraph, and those without prose.
PARAGRAPHS = re.compile(
    r"p|para|simpara|title|li|item|listitem|t[dhr]|d[td]|term|h\d|div|body|entry|note|screen"
    r"|flowpara|text"
)
SKIPPED = {"script", "style", "pre", "programlisting", "screen", "head", "media"}


class Blocks(HTMLParser):
    """Collects the text of HTML, DocBook, Mallard or SVG, one string a paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.text: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skipped += tag in SKIPPED
        if PARAGRAPHS.fullmatch(tag):
            self.end_block()

    def handle_endtag(self, tag: str) -> None:
        self.skipped = max(0, self.skipped - (tag in SKIPPED))
        if PARAGRAPHS.fullmatch(tag):
            self.end_block()

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.text.append(data)

    def end_block(self) -> None:
        self.blocks.append("".join(self.text))
        self.text = []


def markup_blocks(data: bytes) -> list[str]:
    parser = Blocks()
    parser.feed(data.decode("utf-8", "replace"))
    parser.end_block()
    return parser.blocks


def translations(data: bytes) -> list[str]:
    """Return the messages of a .mo catalogue, without markup and marks of shortcuts."""
    catalogue = gettext.GNUTranslations(io.BytesIO(data))._catalog  # type: ignore[attr-defined]
    messages = [text for key, text in catalogue.items() if key and isinstance(text, str)]
    return [
        re.sub(r"<[^>]*>", " ", re.sub(r"[_&](?=\w)", "", html.unescape(paragraph)))
        for text in messages
        for paragraph in text.split("\n\n")
    ]


def manual_page(data: bytes) -> list[str]:
    """Return the paragraphs of a manual page, in roff."""
    blocks = [""]
    for line in data.decode("utf-8", "replace").splitlines():
        macro = re.match(r"[.']\s*(\w+)?\s*(.*)", line)
        if macro and macro[1] in ("B", "I", "BR", "RB", "IR", "RI", "BI", "IB"):
            blocks[-1] += " " + macro[2].replace('"', "")
        elif macro or not line.strip():
            blocks.append("")
        else:
            blocks[-1] += " " + line
    return [
        re.sub(r"\\(?:\[[^]]*\]|f\[[^]]*\]|f.|\(..|[&%/,c:])|\\\|", "", block).replace("\\-", "-")
        for block in blocks
    ]


OLD_SPELLING = {
    **{"á": "a", "é": "e", "ó": "o", "ú": "u", "Á": "A", "É": "E", "Ó": "O"},
    **{"fué": "fue", "fuí": "fui", "dió": "dio", "vió": "vio", "pié": "pie"},
}


def sword_books(index: bytes, data: bytes) -> Iterator[list[str]]:
    """Yield the books of a compressed SWORD module, a verse a line, in the spelling of today."""
    for start, size, _ in struct.iter_unpack("<III", index):
        text = zlib.decompress(data[start : start + size]).decode("utf-8", "replace")
        text = re.sub(r" (?=[,.;:!?])|(?<=[¡¿]) ", "", re.sub(r"<[^>]*>", "", text))
        for old, new in OLD_SPELLING.items():
            text = re.sub(rf"\b{old}\b", new, text)
        yield text.splitlines()


def package_documents(package: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the paragraphs of each Spanish document in a package.

    Exits if the package is damaged.
    """
    tar = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=False
    )
    if tar.returncode:
        sys.exit(f"{package} is damaged: delete it and run spanish_text.py again")
    index = b""
    with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as archive:
        for member in archive:
            if not member.isfile() or not SPANISH_PATH.search(member.name):
                continue
            data = archive.extractfile(member).read()  # type: ignore[union-attr]
            path = member.name
            if path.endswith((".gz", ".bz2")):
                path, _, suffix = path.rpartition(".")
                data = gzip.decompress(data) if suffix == "gz" else bz2.decompress(data)
            name = Path(path)
            if name.suffix == ".bzs":
                index = data
            elif name.suffix == ".bzz":
                for number, book in enumerate(sword_books(index, data)):
                    yield f"{path}/{number}", book
            elif name.suffix in (".html", ".page", ".docbook", ".svg", ".xml", ".xhtml"):
                yield path, markup_blocks(data)
            elif name.suffix == ".mo":
                yield path, translations(data)
            elif re.fullmatch(r"\.\d\w*", name.suffix) and "/man/" in path:
                yield path, manual_page(data)
            elif name.suffix in (".fortunes", ".txt") and "changelog" not in path:
                yield path, re.split(r"\n%+\n|\n\n", data.decode("utf-8", "replace"))


FOREIGN = re.compile(r"\b(?:the|of|and|is|to|that|for|with|this|are|der|und|les|des)\b", re.I)
SPANISH = re.compile(
    r"\b(?:el|la|los|las|de|del|que|en|un|una|es|se|con|por|para|no|su|al|lo|y|o|le|sus)\b", re.I
)


def sentences(paragraphs: list[str]) -> Iterator[str]:
    """Yield the Spanish sentences of paragraphs: no headings, code or other languages."""
    for paragraph in paragraphs:
        text = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.?!:;…»”\"]) (?=[¿¡«“\"(]?[A-ZÁÉÍÓÚÑ])", text):
            words = re.findall(r"[^\W\d_]+", sentence)
            letters = sum(map(len, words))
            spanish = len(SPANISH.findall(sentence))
            if (
                5 <= len(words) <= 150
                and letters >= 0.7 * len(sentence.replace(" ", ""))
                and spanish >= max(1, 0.1 * len(words), 2 * len(FOREIGN.findall(sentence)))
            ):
                yield sentence


def download(name: str, directory: Path) -> Path | None:
    """Return the file of a package, or None if there is no such package."""
    if not list(directory.glob(f"{name}_*.deb")):
        subprocess.run(["apt-get", "download", "-qq", name], cwd=directory, check=False)
    return next(directory.glob(f"{name}_*.deb"), None)


def is_held_out(path: str) -> bool:
    digest = hashlib.sha256(path.encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 < HELD_OUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).parent / "text"
    parser.add_argument("out", type=Path, nargs="?", default=default, help="directory to write")
    out = parser.parse_args().out
    if not shutil.which("dpkg-deb"):
        sys.exit("spanish_text.py needs Debian or Ubuntu, whose packages have the text")
    for directory in ("packages", "train"):
        (out / directory).mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    total: Counter[bool] = Counter()
    print(f"{'package':32}{'documents':>10}{'MB':>8}{'held out':>10}")
    with (out / "held-out.txt").open("w", encoding="utf-8") as held_out:
        for name in PACKAGES:
            package = download(name, out / "packages")
            if package is None:
                continue
            bytes_written: Counter[bool] = Counter()
            documents = 0
            with (out / "train" / f"{name}.txt").open("w", encoding="utf-8") as train:
                for path, paragraphs in package_documents(package):
                    lines = []
                    for sentence in sentences(paragraphs):
                        if sentence.lower() not in seen:
                            seen.add(sentence.lower())
                            lines.append(sentence)
                    if lines:
                        text = "\n".join(lines) + "\n\n"
                        (held_out if is_held_out(path) else train).write(text)
                        bytes_written[is_held_out(path)] += len(text.encode())
                        documents += 1
            total += bytes_written
            megabytes, held = bytes_written.total() / 1e6, bytes_written[True] / 1e6
            print(f"{name:32}{documents:10}{megabytes:8.2f}{held:10.2f}", flush=True)
    print(f"{'all':42}{total.total() / 1e6:8.2f}{total[True] / 1e6:10.2f}")


if __name__ == "__main__":
    main()
