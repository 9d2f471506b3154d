"""The paper's runs on sentences: GLUE's files, a tokenizer, a tiny classifier of transformers, without a network.

Laws: texts and labels come from the columns that the header or the command line names; padding changes no logit; a
local folder is read as it was saved; what is wrong is named with file and line.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="pip install '.[recipes]'")

from bench.__main__ import main
from bench.paper.task import Task
from bench.paper.text import HEADERS, read_table, text_task, word_tokenizer

WORDS = ("a film with charm", "dull and slow", 'it\'s a "good" one', "no plot at all")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a connection fails."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"asked for the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def glue(root: Path, header: tuple[str, ...] = ("sentence", "label"), rows: int = 24) -> Path:
    """Files of a task with these text and label columns, an index before them, and its label from the first text."""
    root.mkdir(exist_ok=True)
    for name, count in (("train.tsv", rows), ("dev.tsv", rows // 2)):
        lines = ["\t".join(("index", *header))]
        for i in range(count):
            texts = [f"{WORDS[i % 4]} {j}" for j in range(len(header) - 1)]
            lines.append("\t".join((str(i), *texts, ("good", "bad")[i % 2])))
        (root / name).write_text("\ufeff" + "\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("header", HEADERS)
def test_the_columns_of_each_task_are_known_by_its_header(header: tuple[str, ...], tmp_path: Path) -> None:
    texts, words = read_table(glue(tmp_path, header) / "train.tsv")
    assert [len(text) for text in texts] == [len(header) - 1] * 24
    assert texts[2][0] == 'it\'s a "good" one 0'  # a quote is a letter
    assert words[:3] == ["good", "bad", "good"]


def test_columns_may_be_named_or_numbered(tmp_path: Path) -> None:
    path = glue(tmp_path, ("other", "text", "sentiment")) / "train.tsv"
    texts, words = read_table(path, ("text", "sentiment"))
    assert texts[0] == ("a film with charm 1",) and words[1] == "bad"
    path.write_text("gj04\t1\t\tFine words .\nbc73\t0\t*\tWords fine .\n")  # CoLA has no header
    assert read_table(path, ("3", "1")) == ([("Fine words .",), ("Words fine .",)], ["1", "0"])
    path.write_text(
        '\ufeffsentence\tlabel\n"Fine words\t1\nWords" fine\t0\n'
    )  # a mark before, quotes that do not close
    assert read_table(path) == ([('"Fine words',), ('Words" fine',)], ["1", "0"])


def test_what_is_wrong_in_a_file_is_named(tmp_path: Path) -> None:
    path = glue(tmp_path) / "train.tsv"
    with pytest.raises(
        ValueError, match=r"train\.tsv: got the columns \['index', 'sentence', 'label'\], expected \['x'"
    ):
        read_table(path, ["x", "label"])
    path.write_text("sentence1\tsentence2\tscore\na\tb\t4.2\n")
    with pytest.raises(ValueError, match=r"got the columns .*'score'\], expected .*; see --columns"):
        read_table(path)
    path.write_text("sentence\tlabel\nfine\t1\nshort\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 3: got 1 columns, expected at least 2"):
        read_table(path)
    for text, named in (("", "got an empty file"), ("sentence\tlabel\n", "got no row below the header")):
        path.write_text(text)
        with pytest.raises(ValueError, match=named):
            read_table(path)
    glue(tmp_path)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\tunheard\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: got the label 'unheard', expected one of those of train\.tsv"):
        text_task(tmp_path)
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv"):
        text_task(tmp_path)


def logits(task: Task) -> torch.Tensor:
    torch.manual_seed(0)
    net = task.build().eval()
    with torch.no_grad():
        found: torch.Tensor = net(task.test.inputs)
        wider = torch.nn.functional.pad(task.test.inputs, (0, 3), value=net.padding)
        torch.testing.assert_close(net(wider), found)  # padding is masked
    return found


def test_two_sentences_and_a_model_of_a_local_folder(tmp_path: Path) -> None:
    root = glue(tmp_path / "mrpc", ("#1 String", "#2 String", "Quality"))
    task = text_task(root, length=24)
    assert task.classes == 2 and task.train.labels[:3].tolist() == [1, 0, 1]  # sorted: bad, good
    assert task.train.inputs.shape[0] == 24 and task.train.inputs.shape[1] <= 21
    assert not torch.equal(task.train.inputs[0], task.train.inputs[1])
    torch.manual_seed(0)
    folder = tmp_path / "model"
    task.build().model.save_pretrained(folder)
    word_tokenizer(read_table(root / "train.tsv")[0]).save_pretrained(folder)
    again = text_task(root, folder, length=24)
    assert torch.equal(again.test.inputs, task.test.inputs)
    torch.testing.assert_close(logits(again), logits(task))
    with pytest.raises((OSError, ValueError)):
        text_task(root, tmp_path / "nothing")


def test_the_command_fine_tunes_on_sentences(tmp_path: Path) -> None:
    root, out = glue(tmp_path / "SST-2", rows=64), tmp_path / "out"
    where = ["--data", "text", "--root", str(root), "--out", str(out), "--device", "cpu"]
    small = ["--model-config", "tiny", "--epochs", "4", "--seeds", "1", "--lr", "0.1", "--batch", "16"]
    assert main(["paper", *where, *small]) == 0
    found = json.loads((out / "paper.json").read_text())["results"]
    assert [row["settings"]["method"] for row in found] == ["erm", "sam", "tsam"]
    for row in found:
        assert row["settings"]["data"] == "text SST-2" and row["settings"]["net"] == "tiny"
        assert row["settings"]["clip"] == 1.0 and row["finite"]
        assert row["losses"][-1] < 0.6 * row["losses"][0]  # the label is in the words
    assert "GLUE's dev rows" in (out / "paper.md").read_text()
