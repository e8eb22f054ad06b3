"""Make labelled tasks from a text in any language: the people who wrote it gave the labels.

    python examples/make_tasks.py examples/text/held-out.txt examples/text/tasks

writes `train.tsv`, `dev.tsv` and `test.tsv` of two tasks, in the format of `fine_tuning.py`. A line
of the text is a sentence, and blank lines separate documents. No document is in two of the files.

accents (tagging): the words of a sentence without their accents. The tag of a word says which ones
    it had: `2´` is an acute accent on the second letter from the end, as in *canción*.
words (classification): in half of the sentences one word was replaced by another form of it, such
    as *instalado* by *instalada*. The label says whether one was.

With `--tagged FILE` it also makes `parts-of-speech` from sentences that are tagged already, one a
line, as in `El/DA perro/NC`.
"""

import argparse
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Share of the sentences in these parts; `train` has the rest.
DEV, TEST = 0.04, 0.16
#: Sentences with so many words are used, and so many of a document.
LENGTHS = range(5, 41)
PER_DOCUMENT = 500

MARKS = {"\u0301": "´", "\u0303": "~", "\u0308": "¨", "\u0300": "`", "\u0302": "^", "\u0327": ","}
NONE = "-"


def strip_accents(word: str) -> tuple[str, str]:
    """Return a word without combining marks, and the tag that says where they were."""
    letters = list(unicodedata.normalize("NFD", word))
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    tags, after = [], 0
    for letter in reversed(letters):
        if unicodedata.combining(letter):
            tags.append(f"{after + 1}{MARKS.get(letter, letter)}")
        else:
            after += 1
    return plain, "".join(tags) or NONE


def restore_accents(plain: str, tag: str) -> str:
    """Undo `strip_accents`; a tag that does not fit the word changes nothing."""
    symbols = {symbol: mark for mark, symbol in MARKS.items()}
    letters = list(plain)
    for position, symbol in re.findall(r"(\d+)(\D)", tag):
        if int(position) <= len(plain):
            letters[-int(position)] += symbols.get(symbol, symbol)
    return unicodedata.normalize("NFC", "".join(letters))


def restore(text: str, classify: Callable[[str], list[dict[str, Any]]]) -> str:
    """Restore the accents of a text with a token-classification pipeline of transformers.

    The last token of a word has its tag, as in `fine_tuning.py`.
    """
    tags = {token["end"]: token["entity"] for token in classify(text)}
    return re.sub(r"\w+", lambda word: restore_accents(word[0], tags.get(word.end(), NONE)), text)


def word_forms(sentences: list[str]) -> dict[str, Counter[str]]:
    """Return each word's other forms: the same beginning, and an ending of up to two letters."""
    counts = Counter(word for line in sentences for word in re.findall(r"[^\W\d_]{3,}", line))
    groups = defaultdict(set)
    for word in counts:
        for ending in range(3):
            if len(word) - ending >= 3:
                groups[word[: len(word) - ending]].add(word)
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for beginning, words in groups.items():
        for word in words:
            for other in sorted(words):  # the order of a set differs between processes
                if other != word and max(len(word), len(other)) - len(beginning) <= 2:
                    forms[word][other] = counts[other]
    return forms


def tagged(pairs: list[tuple[str, str]]) -> str:
    """Return the lines of a sentence with tags."""
    return "".join(f"{word}\t{tag}\n" for word, tag in pairs) + "\n"


def accents(sentences: list[str]) -> Iterator[str]:
    for sentence in sentences:
        yield tagged([strip_accents(word) for word in re.findall(r"\w+|[^\w\s]", sentence)])


def words(
    sentences: list[str], forms: dict[str, Counter[str]], rng: random.Random
) -> Iterator[str]:
    for sentence in sentences:
        places = [word for word in re.finditer(r"[^\W\d_]{3,}", sentence) if word[0] in forms]
        if places and rng.random() < 0.5:
            place = rng.choice(places)
            options = forms[place[0]]
            (form,) = rng.choices(list(options), weights=list(options.values()))
            yield f"{sentence[: place.start()]}{form}{sentence[place.end() :]}\treplaced\n"
        else:
            yield f"{sentence}\toriginal\n"


def write(directory: Path, parts: dict[str, Iterator[str]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for part, lines in parts.items():
        (directory / f"{part}.tsv").write_text("".join(lines), encoding="utf-8")


def parts_of_speech(lines: list[str]) -> Iterator[str]:
    for line in lines:
        pairs = [token.rpartition("/") for token in line.split()]
        yield tagged([(word, tag) for word, _, tag in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tagged", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(0)
    documents = []
    for document in arguments.text.read_text("utf-8").split("\n\n"):
        lines = [unicodedata.normalize("NFC", line) for line in document.splitlines()]
        lines = [line for line in lines if len(line.split()) in LENGTHS]
        if lines:
            documents.append(rng.sample(lines, min(len(lines), PER_DOCUMENT)))
    rng.shuffle(documents)
    forms = word_forms([line for document in documents for line in document])
    total = sum(map(len, documents))
    parts: dict[str, list[str]] = {"test": [], "dev": [], "train": []}
    for document in documents:
        if len(parts["test"]) < TEST * total:
            parts["test"] += document
        elif len(parts["dev"]) < DEV * total:
            parts["dev"] += document
        else:
            parts["train"] += document
    for part, sentences in parts.items():
        rng.shuffle(sentences)
        print(f"{part}: {len(sentences)} sentences")
    write(arguments.out / "accents", {part: accents(lines) for part, lines in parts.items()})
    write(
        arguments.out / "words", {part: words(lines, forms, rng) for part, lines in parts.items()}
    )
    if arguments.tagged:
        lines = arguments.tagged.read_text("utf-8").splitlines()
        dev, test = len(lines) // 10, len(lines) // 4
        parts = {
            "test": lines[:test],
            "dev": lines[test : test + dev],
            "train": lines[test + dev :],
        }
        write(
            arguments.out / "parts-of-speech",
            {part: parts_of_speech(lines) for part, lines in parts.items()},
        )


if __name__ == "__main__":
    main()
