from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cluster.errors import TokenizerError
from jobs.data.tokenizer import (
    BEGIN,
    END,
    check_fits,
    copy_tokenizer,
    end_token_id,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = ["def read(path):\n    return path.read_text()\n", "for name in names:\n    print(name)\n"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 20, 300, folder)
    return folder


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokenizer_when_text_is_encoded_and_decoded_gives_it_back(
    directory: Path, text: str
) -> None:
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if BEGIN not in text and END not in text:
        assert tokenizer.decode(ids) == text
    assert all(0 <= token < 300 for token in ids)


def test_tokenizer_when_encoding_puts_begin_first(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("def")[0] == tokenizer.bos_token_id == 0
    assert end_token_id(tokenizer) == 1


def test_tokenizer_when_loaded_by_transformers_is_the_same(directory: Path) -> None:
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(str(directory))
    assert ours.encode(TEXTS[0]) == theirs.encode(TEXTS[0])


def test_chat_template_when_applied_shows_the_messages(directory: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = load_tokenizer(directory).apply_chat_template(messages, tokenize=False)
    assert text == f"{BEGIN}hello\n"


def test_training_when_repeated_gives_the_same_file(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS * 20, 300, tmp_path)
    name = "tokenizer.json"
    assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_training_when_there_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer([""], 300, tmp_path)


def test_training_when_vocabulary_cannot_hold_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="vocab_size=100 is too small"):
        train_tokenizer(TEXTS, 100, tmp_path)


def test_fit_when_the_model_has_fewer_rows_is_refused(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    size = len(tokenizer)
    check_fits(tokenizer, size)
    message = rf"{size} tokens .* vocab_size is {size - 1}.*at least {size}"
    with pytest.raises(TokenizerError, match=message):
        check_fits(tokenizer, size - 1)


def test_loading_when_the_file_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path)


def test_loading_when_the_file_is_damaged_is_refused(directory: Path, tmp_path: Path) -> None:
    copy_tokenizer(directory, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_end_token_when_the_tokenizer_has_none_is_refused(directory: Path, tmp_path: Path) -> None:
    copy_tokenizer(directory, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<|end|>",', ""))
    with pytest.raises(TokenizerError, match="no eos_token"):
        end_token_id(load_tokenizer(tmp_path))
