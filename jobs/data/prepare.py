"""Text to packed tokens: split by document, train or load the tokenizer, tokenize in parallel.

Takes a TrainConfig and a folder; gives a published folder of shards, written once and reused. It
does not know sequences or batches, nor who trains on them.

Layout: {train,validation,test}-NNNNN.bin, tokenizer/, manifest.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.errors import ConfigError, DataError, IntegrityError
from cluster.storage import digest_file, find_input, read_manifest, staged_directory
from jobs.config import DataConfig, TrainConfig
from jobs.data.corpus import Deduplicator, text_batches, training_texts
from jobs.data.encode import EncodeJob, encode_all
from jobs.data.shards import SplitWriter
from jobs.data.tokenizer import (
    check_fits,
    copy_tokenizer,
    end_token_id,
    load_tokenizer,
    train_tokenizer,
)
from jobs.data.tokens import DATA_KIND, SPLITS, Split, token_dtype
from jobs.plan import resolve_decoder

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class PreparedData:
    """A folder of packed shards and its tokenizer."""

    folder: Path
    vocab_size: int
    num_tokens: dict[Split, int]
    num_documents: dict[Split, int]

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies."""
        return self.folder / TOKENIZER_FOLDER


def prepare(config: TrainConfig, output: Path) -> PreparedData:
    """Write `output`, or reuse it where it was prepared from the same request.

    Raises DataError for missing, empty or too little text, TokenizerError for a tokenizer that
    does not fit the model, ConfigError if `output` was prepared differently, IntegrityError if it
    is damaged.
    """
    request = _request(config)
    if output.exists():
        return _reuse(output, request, config)
    deduplicator = Deduplicator()
    manifest: dict[str, Any] = {"kind": DATA_KIND, "request": request}
    with staged_directory(output, manifest) as staging:
        tokenizer_folder = staging / TOKENIZER_FOLDER
        _provide_tokenizer(config, tokenizer_folder)
        tokenizer = load_tokenizer(tokenizer_folder)
        check_fits(tokenizer, _model_vocab_size(config))
        job = EncodeJob(
            tokenizer_json=tokenizer_folder / "tokenizer.json",
            dtype=token_dtype(len(tokenizer)).str,
            begin_id=tokenizer.bos_token_id,
            end_id=end_token_id(tokenizer),
        )
        splits = _write_shards(config.data, job, staging, deduplicator)
        _check_enough(splits, config.seq_len)
        manifest.update(
            dtype=job.dtype,
            vocab_size=len(tokenizer),
            splits=splits,
            num_duplicates=deduplicator.num_duplicates,
        )
    return _described(output, manifest)


def _request(config: TrainConfig) -> dict[str, Any]:
    """Return the values that decide what the shards hold."""
    origin = _tokenizer_origin(config)
    return {
        "data": config.data.model_dump(mode="json", exclude={"num_processes"}),
        "tokenizer": {
            "sha256": digest_file(origin / "tokenizer.json")
            if origin is not None and (origin / "tokenizer.json").is_file()
            else None,
            **config.tokenizer.model_dump(mode="json", exclude={"path"}),
        },
    }


def _tokenizer_origin(config: TrainConfig) -> Path | None:
    """Return the directory the tokenizer is loaded from; None if one is trained."""
    given = config.tokenizer.path or config.model.init_from
    return None if given is None else find_input(given)


def _model_vocab_size(config: TrainConfig) -> int:
    return resolve_decoder(config).vocab_size


def _reuse(output: Path, request: dict[str, Any], config: TrainConfig) -> PreparedData:
    manifest = read_manifest(output)
    if manifest.get("kind") != DATA_KIND:
        raise ConfigError(f"{output} exists and is not prepared data. Choose another run name.")
    if manifest["request"] != request:
        raise ConfigError(
            f"{output} was prepared with {_differences(manifest['request'], request)}. "
            "Choose another run name, restore the config, or delete that folder."
        )
    for name, entry in manifest["files"].items():
        if name.startswith(f"{TOKENIZER_FOLDER}/"):
            path = output / name
            if not path.is_file() or digest_file(path) != entry["sha256"]:
                raise IntegrityError(f"{path} is damaged or missing. Delete {output} to redo it.")
    _check_enough(manifest["splits"], config.seq_len)
    check_fits(load_tokenizer(output / TOKENIZER_FOLDER), _model_vocab_size(config))
    return _described(output, manifest)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    found = [
        f"{section}.{key}={before.get(section, {}).get(key)!r} (now {value!r})"
        for section, values in now.items()
        for key, value in values.items()
        if before.get(section, {}).get(key) != value
    ]
    return ", ".join(found) or "other keys"


def _described(output: Path, manifest: dict[str, Any]) -> PreparedData:
    splits = manifest["splits"]
    return PreparedData(
        folder=output,
        vocab_size=int(manifest["vocab_size"]),
        num_tokens={split: int(splits[split]["num_tokens"]) for split in SPLITS},
        num_documents={split: int(splits[split]["num_documents"]) for split in SPLITS},
    )


def _provide_tokenizer(config: TrainConfig, folder: Path) -> None:
    origin = _tokenizer_origin(config)
    if origin is None:
        texts = training_texts(config.data, config.tokenizer.train_bytes)
        train_tokenizer(texts, config.tokenizer.vocab_size, folder)
        return
    load_tokenizer(origin)
    folder.mkdir()
    copy_tokenizer(origin, folder)


def _write_shards(
    config: DataConfig, job: EncodeJob, folder: Path, deduplicator: Deduplicator
) -> dict[Split, dict[str, Any]]:
    writers: dict[Split, SplitWriter] = {
        split: SplitWriter(folder, split, job.dtype) for split in SPLITS
    }
    try:
        with _progress() as progress:
            task = progress.add_task("tokenizing", total=None, documents=0)
            batches = text_batches(config, deduplicator)
            for names, encoded in encode_all(batches, job, config.num_processes):
                for split, tokens in zip(names, encoded, strict=True):
                    writers[split].add(tokens)
                progress.update(
                    task, documents=sum(writer.num_documents for writer in writers.values())
                )
    finally:
        for writer in writers.values():
            writer.close()
    return {split: writer.summary() for split, writer in writers.items()}


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[documents]} documents"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _check_enough(splits: dict[Split, dict[str, Any]], seq_len: int) -> None:
    for split in SPLITS:
        found = splits[split]["num_tokens"]
        if found < seq_len + 1:
            raise DataError(
                f"the {split} split has {splits[split]['num_documents']} documents with {found} "
                f"tokens; one sequence of seq_len={seq_len} needs {seq_len + 1}. Give more or "
                f"longer documents, a larger data.{split}_fraction, or a smaller seq_len."
                if split != "train"
                else f"the train split has {found} tokens; one sequence of seq_len={seq_len} "
                f"needs {seq_len + 1}. Give more text or a smaller seq_len."
            )
