"""Sentence classification from GLUE's files, with a sequence classifier of transformers; nothing is fetched.

train.tsv and dev.tsv (MNLI: dev_matched.tsv) as GLUE ships them: columns by tabs, no quotes. GLUE's test labels are not
public, so dev is the test set here. Layout: tokens int64 [n, length], padded at the end; labels int64 [n], the sorted
words of the label column. The net sees as attention mask where there is no padding.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .task import Rows, Task

# Text and label columns of GLUE's tasks by their headers, the first that fits: MRPC; QNLI; QQP; RTE, WNLI; MNLI; SST-2.
HEADERS = (
    ("#1 String", "#2 String", "Quality"),
    ("question", "sentence", "label"),
    ("question1", "question2", "is_duplicate"),
    ("sentence1", "sentence2", "label"),
    ("sentence1", "sentence2", "gold_label"),
    ("sentence", "label"),
)
LENGTH = 64  # tokens, as in the authors' script
TINY_WORDS = 2_000


class Classifier(nn.Module):
    """Tokens int64 [n, length] to logits [n, classes]."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits; padding is masked."""
        logits: Tensor = self.model(input_ids=tokens, attention_mask=(tokens != self.padding).long()).logits
        return logits


def text_task(root: Path, model: Path | None = None, columns: Sequence[str] = (), length: int = LENGTH) -> Task:
    """A data set of GLUE with the classifier of a local folder, or with a tiny one of random weights (tests).

    Args:
        root: the folder with train.tsv and dev.tsv.
        model: a folder of transformers with model and tokenizer; ``None``: DistilBERT's form, 2 layers of width 32,
            over the most frequent words of the training text.
        columns: names of one or two text columns and of the label column, or their numbers from 0 where there is no
            header (CoLA: 3 1); empty: by the header, for the tasks of ``HEADERS``.
        length: most tokens of a row. Default 64.

    Raises:
        FileNotFoundError, OSError: if a file or the model is not there.
        ValueError: if a column or a label is unknown, or a row is too short, naming file and line.
    """
    import transformers

    dev = next((root / name for name in ("dev.tsv", "dev_matched.tsv") if (root / name).is_file()), root / "dev.tsv")
    texts, words = read_table(root / "train.tsv", columns)
    dev_texts, dev_words = read_table(dev, columns)
    names = sorted(set(words))
    if unknown := set(dev_words) - set(names):
        raise ValueError(f"{dev}: got the label {min(unknown)!r}, expected one of those of train.tsv, {names}")
    if model is None:
        tokenizer = word_tokenizer(texts)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)

    def rows(texts: list[tuple[str, ...]], words: list[str]) -> Rows:
        pairs = [list(column) for column in zip(*texts, strict=True)]
        found = tokenizer(*pairs, truncation=True, max_length=length, padding=True, return_tensors="pt")
        return Rows(found["input_ids"], torch.tensor([names.index(word) for word in words]))

    def build() -> nn.Module:
        if model is not None:
            kind = transformers.AutoModelForSequenceClassification
            return Classifier(
                kind.from_pretrained(model, num_labels=len(names), local_files_only=True), tokenizer.pad_token_id
            )
        size: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "initializer_range": 0.2}
        size |= {"vocab_size": len(tokenizer), "max_position_embeddings": length, "num_labels": len(names)}
        config = transformers.DistilBertConfig(**size, pad_token_id=tokenizer.pad_token_id)
        return Classifier(transformers.DistilBertForSequenceClassification(config), tokenizer.pad_token_id)

    return Task(
        name=f"text {root.name}",
        train=rows(texts, words),
        test=rows(dev_texts, dev_words),
        classes=len(names),
        build=build,
        prepare=lambda tokens, generator: tokens,
        note="the test rows are GLUE's dev rows, as its test labels are not public; accuracy, for each task",
    )


def read_table(path: Path, columns: Sequence[str] = ()) -> tuple[list[tuple[str, ...]], list[str]]:
    """The texts of each row, one or two, and its label's word; ``columns`` as in :func:`text_task`."""
    with path.open(encoding="utf-8-sig", newline="") as file:  # MRPC's files begin with a byte-order mark
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not lines:
        raise ValueError(f"{path}: got an empty file, expected rows of texts and labels")
    header = lines[0]
    if columns and all(name.isdecimal() for name in columns):
        places, first = [int(name) for name in columns], 0
    else:
        known = [columns] if columns else HEADERS
        chosen = next((names for names in known if set(names) <= set(header)), None)
        if chosen is None:
            raise ValueError(
                f"{path}: got the columns {header}, expected {' or '.join(map(str, known))}; see --columns"
            )
        places, first = [header.index(name) for name in chosen], 1
    for number, line in enumerate(lines[first:], first + 1):
        if len(line) <= max(places):
            raise ValueError(f"{path}, line {number}: got {len(line)} columns, expected at least {max(places) + 1}")
    rows = [[line[place] for place in places] for line in lines[first:]]
    if not rows:
        raise ValueError(f"{path}: got no row below the header, expected texts and labels")
    return [tuple(row[:-1]) for row in rows], [row[-1] for row in rows]


def word_tokenizer(texts: list[tuple[str, ...]]) -> Any:
    """Words by white space and punctuation, the most frequent of the training text."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=TINY_WORDS, special_tokens=special)
    words.train_from_iterator((text for row in texts for text in row), trainer)
    ends = [(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
