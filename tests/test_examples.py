"""The scripts and the notebook in examples/ do what they say."""

import bz2
import gzip
import importlib
import json
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from conftest import SPANISH, child, python
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOK = "pretrain_electra_spanish.ipynb"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


make_tasks, spanish_text = load("make_tasks"), load("spanish_text")


# Collecting text.


def mo(messages: dict[str, str]) -> bytes:
    """Return a catalogue in the format of gettext."""
    pairs = sorted((key.encode(), value.encode()) for key, value in messages.items())
    strings = [key for key, _ in pairs] + [value for _, value in pairs]
    data, table, offset = b"", b"", 28 + 8 * len(strings)
    for string in strings:
        table += struct.pack("<II", len(string), offset + len(data))
        data += string + b"\0"
    header = (0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return struct.pack("<7I", *header) + table + data


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs Debian or Ubuntu")
def test_documents_of_a_package(tmp_path: Path) -> None:
    verses = zlib.compress("<w>Á</w> la casa fué <b>Noé</b> ,\r\ny vió el mar .\n".encode())
    header = "Content-Type: text/plain; charset=UTF-8\n"
    files = {
        "usr/share/help/es/app/a.page": b"<page><p>Uno</p><p>Dos</p></page>",
        "usr/share/help/fr/app/a.page": "<page><p>Français</p></page>".encode(),
        "usr/share/locale/es/LC_MESSAGES/app.mo": mo({"": header, "k": "_Abrir <b>todo</b>"}),
        "usr/share/man/es/man1/ls.1.gz": gzip.compress(b".TH LS\n.PP\nTres\n"),
        "usr/share/games/fortunes/es/dichos.fortunes": b"Cuatro\n%\nCinco\n%\n",
        "usr/share/doc/texto.es.txt.bz2": bz2.compress(b"Seis\n\nSiete\n"),
        "usr/share/sword/spaRV1909eb/ot.bzs": struct.pack("<III", 0, len(verses), 99),
        "usr/share/sword/spaRV1909eb/ot.bzz": verses,
        "DEBIAN/control": b"Package: x\nVersion: 1\nArchitecture: all\n"
        b"Maintainer: x <x@example.org>\nDescription: x\n",
    }
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    package = tmp_path / "x.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", tmp_path / "root", package]
    subprocess.run(command, check=True, capture_output=True)
    texts = {
        Path(name).parent.name if name.endswith("/0") else Path(name).name: [
            " ".join(text.split()) for text in paragraphs if text.strip()
        ]
        for name, paragraphs in spanish_text.package_documents(package)
    }
    assert texts == {
        "a.page": ["Uno", "Dos"],
        "app.mo": ["Abrir todo"],
        "ls.1": ["Tres"],
        "dichos.fortunes": ["Cuatro", "Cinco"],
        "texto.es.txt": ["Seis", "Siete"],
        "ot.bzz": ["A la casa fue Noé,", "y vio el mar."],
    }
    package.write_bytes(package.read_bytes()[:-100])  # a download that was interrupted
    with pytest.raises(SystemExit, match="is damaged: delete it"):
        list(spanish_text.package_documents(package))


def test_sentences_of_markup_and_manual_pages() -> None:
    html = "<head><title>x</title></head><p>La casa es <b>muy</b> bonita hoy.</p><pre>ls -l</pre>"
    [sentence] = spanish_text.sentences(spanish_text.markup_blocks(html.encode()))
    assert sentence == "La casa es muy bonita hoy."
    roff = '.TH LS 1\n.PP\nLa opción \\fB\\-l\\fP muestra\n.I "los detalles"\nde la lista.\n.SH VER'
    [sentence] = spanish_text.sentences(spanish_text.manual_page(roff.encode()))
    assert sentence == "La opción -l muestra los detalles de la lista."


@pytest.mark.parametrize(
    "text",
    [
        "The list of the files is sorted by the name of the user.",
        "Archivo Editar Ver Insertar Formato",
        "=SUMA(A1:B2) y =SUMA(C1:C9) / 12345 + 67890 de 2 a 3 es 4 y 5",
        "La casa.",
    ],
)
def test_what_is_no_spanish_sentence(text: str) -> None:
    assert not list(spanish_text.sentences([text]))


# Tasks.


@given(st.text(st.sampled_from("aeiounAEIÁáéíóúüñçàêbcÑ"), min_size=1, max_size=12))
def test_accents_are_restored(word: str) -> None:
    plain, tag = make_tasks.strip_accents(word)
    assert plain.isascii()
    assert make_tasks.restore_accents(plain, tag) == word
    assert (tag == make_tasks.NONE) == (plain == word)
    assert make_tasks.restore_accents("si", "5´") == "si", "a tag that does not fit"


def test_accents_of_a_text_are_restored() -> None:
    text = "La funcion, tambien aqui."

    def classify(text: str) -> list[dict[str, object]]:
        tags = {"func": "-", "ion": "2´", "tambien": "2´", "aqui": "1´", ",": "-"}
        return [{"end": text.index(t) + len(t), "entity": tag} for t, tag in tags.items()]

    assert make_tasks.restore(text, classify) == "La función, también aquí."


def test_tasks_are_repeatable_and_share_no_document(tmp_path: Path) -> None:
    forms = "Los libros, el libro, la libra y las libras están aquí."
    documents = [[f"{line} Párrafo {i}." for line in [*SPANISH, forms]] for i in range(60)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("\n".join(lines) for lines in documents), encoding="utf-8")
    made = []
    for hash_seed in "01":
        done = python(EXAMPLES / "make_tasks.py", text, tmp_path, env={"PYTHONHASHSEED": hash_seed})
        assert done.returncode == 0, done.stderr
        made.append([path.read_bytes() for path in sorted(tmp_path.glob("*/*.tsv"))])
    assert made[0] == made[1]
    seen = []
    for part in ("train", "dev", "test"):
        rows = (tmp_path / "words" / f"{part}.tsv").read_text("utf-8").splitlines()
        assert {row.rpartition("\t")[2] for row in rows} == {"original", "replaced"}
        seen.append({row.rpartition("\t")[0].rpartition(" ")[2] for row in rows})
        tokens = (tmp_path / "accents" / f"{part}.tsv").read_text("utf-8")
        assert tokens.count("\n\n") == len(rows)
        assert "Parrafo\t6´" in tokens
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_replaced_words_are_forms_of_the_original() -> None:
    lines = ["El libro está abierto", "Los libros están abiertos", "La casa está abierta"]
    forms = make_tasks.word_forms(lines)
    assert set(forms["abierto"]) == {"abiertos", "abierta"}
    rng = random.Random(0)
    for row in make_tasks.words(lines * 50, forms, rng):
        sentence, label = row.rstrip("\n").split("\t")
        assert (sentence in lines) == (label == "original")


# Fine-tuning.


def test_fine_tuning(tmp_path: Path) -> None:
    result = json.loads(child("fine_tuning_parts.py", EXAMPLES, tmp_path).splitlines()[-1])
    # Of the words with a tag, two are right; four are predicted, and three are there.
    assert result["tagging"] == pytest.approx({"accuracy": 3 / 5, "f1": 2 * 2 / (4 + 3)})
    assert result["classification"] == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})
    # Upstream: decay ** (layers + 2 - depth), with depth 0 for embeddings, and 1 for no decay.
    assert set(result["rates"]) == {"0.0625", "0.125", "0.25", "1.0"}
    assert result["labels"] == [-100, -100, 7, 8, -100]
    assert result["scores"]["text"]["test"]["accuracy"] > 0.95
    assert result["scores"]["tags"]["test"]["f1"] > 0.95
    assert result["table"].splitlines() == [
        "| task | metric | model | 100 | 1,000 |",
        "|---|---|---|---|---|",
        "| tags | F1 | mine | 52.0 ± 2.8 | 90.0 |",
        "| tags | F1 | random |  | 40.0 |",
        "| tags | accuracy | mine | 97.0 |  |",
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert result["entities"] == ["l", "c", "g"]  # the saved model has the names of the tags


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("fine_tuning.py ./model ./task", "task"),
        ("fine_tuning.py ./model .", "model"),
        ("compare.py scores x=./model --tasks .", "model"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path: Path, command: str, missing: str) -> None:
    for part in ("train", "dev", "test"):
        (tmp_path / f"{part}.tsv").write_text("La casa\tyes\n", encoding="utf-8")
    script, *arguments = command.split()
    done = python(EXAMPLES / script, *arguments, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert missing in done.stderr and "Traceback" not in done.stderr


# The notebook.


def test_notebook_has_outputs_of_a_run() -> None:
    notebook = nbformat.read(EXAMPLES / NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path) -> None:
    """With fewer steps of fine-tuning. The cell that installs finds that nothing is missing."""
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, tmp_path)
    notebook = nbformat.read(EXAMPLES / NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    [cell] = [cell for cell in cells if "steps=300," in cell.source]
    cell.source = cell.source.replace("steps=300,", "steps=20,")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    text = "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    assert "runs/spanish-tiny/hf, and loads in transformers" in text and "'f1': " in text
    assert "La funcion muestra" in text or "La función muestra" in text
    assert (tmp_path / "runs" / "spanish-tiny" / "accents" / "model.safetensors").is_file()
