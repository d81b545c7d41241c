"""Losses of a reference model on the tokens of a run: checked to be of the same tokens, computed once, kept in a file.

Shapes: B rows of a batch, K heads that are scored, T positions.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

from common import HEADS_FILE, UsageError, first_line, load_mtp, load_tokenizer, max_positions, model_dir
from data import load_batch


class Reference:
    """Losses of the reference model at every target: from a file that is made once, or (`--ref-online`) from the model.

    The file lies beside the packed rows and is named after them, the reference's weights and the type of the products:
    float32 `[rows, K, T]`, 0 where there is no target. Until it is whole it is called .part; of a whole block of rows the
    last number, which no target has, is 1. Ranks take turns with blocks; after a kill, and for another run that needs the
    same, whole blocks stay.

    Raises:
        UsageError: nothing there that can be read, or its losses would be of other tokens than the run's.
    """

    def __init__(self, args, model, tokenizer, data, ranks):
        name, folder = f"--ref-model {args.ref_model}", Path(model_dir(args.ref_model))
        try:
            config, other = transformers.AutoConfig.from_pretrained(str(folder)), load_tokenizer(str(folder))
        except Exception as error:  # what a broken file raises has no common class
            raise UsageError(f"{name}: no run folder or Hugging Face model that can be read ({first_line(error)})") from None
        text, own = config.get_text_config(), model.causal_lm.lm_head.weight.shape[0]
        if text.vocab_size != own:
            raise UsageError(f"{name}: its vocabulary has {text.vocab_size} entries, this run's {own}; they must be the same")
        sample = tokenizer.batch_decode(data.train[:8]["input_ids"], skip_special_tokens=True)
        same = other.get_vocab() == tokenizer.get_vocab() and other.eos_token_id == tokenizer.eos_token_id
        if not same or other(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
            raise UsageError(f"{name}: its tokenizer is not this run's (--model {args.model}), so its losses are of other tokens")
        if (longest := max_positions(text)) < args.seq_len:
            raise UsageError(f"{name}: has positions for {longest} tokens, --seq-len is {args.seq_len}")
        heads = folder / HEADS_FILE
        held = int(safe_open(heads, "pt").metadata()["num_heads"]) if heads.exists() else 1
        if args.score_heads == "each" and held != args.num_heads:
            raise UsageError(f"--score-heads each: {name} has {held} head(s), --num-heads is {args.num_heads}")
        files = sorted(f for f in folder.glob("*") if f.suffix in (".safetensors", ".bin") or f.name == "config.json")
        if folder.is_dir() and len(files) < 2:
            raise UsageError(f"{name}: {folder} holds no weights (.safetensors or .bin)")
        digests = [] if files else [name, str(config._commit_hash)]
        for file in files * (ranks.rank == 0):  # read once, not on every rank
            with open(file, "rb") as f:
                digests.append(hashlib.file_digest(f, "sha256").hexdigest())
        self.fingerprint = ranks.of_first(hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16])
        self.name, self.folder, self.args, self.ranks, self.model, self.losses = name, str(folder), args, ranks, None, {}
        self.num_heads = held if args.score_heads == "each" else 1
        record = folder.parent / "args.json"
        record = json.loads(record.read_text()) if folder.name == "model" and record.exists() else {}
        if record.get("data_fingerprint") == data.fingerprint:
            ranks.say("reference was trained on the very documents of this run")
        if record.get("heldout_fingerprint", data.heldout_fingerprint) != data.heldout_fingerprint:
            ranks.say("reference held out other text than this run does: it may have been trained on what is held out here")

    def prepare(self, data):
        """Map, after making what is missing, the losses of all training rows and of the held-out rows of `write_sample`."""
        if self.args.ref_online:
            return self.load()
        for part, rows in (("train", data.train), ("heldout", data.heldout.select(range(min(3, len(data.heldout)))))):
            self.losses[part] = self.stored(rows)
        self.model = None

    def load(self):
        try:
            self.model = self.model or load_mtp(self.folder).to(self.ranks.device).eval()
        except UsageError as error:
            raise UsageError(str(error).replace("--model", "--ref-model", 1)) from None

    def __call__(self, batch, part="train"):
        """Losses `[K, B, T]` of the reference's K heads (1 unless `--score-heads each`) at their targets, nats."""
        if part in self.losses:
            losses_BKT = self.losses[part][batch.rows_B, : len(batch.targets_KBT)]
            return torch.from_numpy(losses_BKT).transpose(0, 1).to(batch.x_BT.device)
        with torch.no_grad(), self.ranks.autocast():
            return self.model(batch.x_BT, batch.targets_KBT[: self.num_heads])

    def stored(self, rows):
        """The file's losses of all `rows`, memory-mapped."""
        source, made_of = Path(rows.cache_files[0]["filename"]), f"1 {self.fingerprint} {self.num_heads} {self.ranks.dtype}"
        file = source.with_name(f"{source.stem}-{len(rows)}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.f32")
        part, shape, size = file.with_suffix(".part"), (len(rows), self.num_heads, self.args.seq_len), 8192 // self.args.seq_len
        blocks = np.array_split(np.arange(len(rows)), math.ceil(len(rows) / max(1, size)))
        if not file.exists():
            part.touch()
            with open(part, "r+b") as f:  # held: another run may finish the file and rename it meanwhile
                there = np.memmap(f, np.float32, "r+", shape=shape)  # grows to its size, of zeros
                for number, block in enumerate(blocks[self.ranks.rank :: self.ranks.world_size]):
                    if number % 100 == 0:
                        self.ranks.say(f"reference losses of {block[0]:,} of {len(rows):,} rows are in {part}")
                    if there[block[-1], -1, -1] != 1:
                        self.load()
                        losses_KBT = self(load_batch(rows, block, self.num_heads, self.ranks.device), "new")
                        f.seek(int(block[0]) * there[0].nbytes)
                        f.write(losses_KBT.transpose(0, 1).float().cpu().numpy().tobytes())
                        f.flush()
                        os.fsync(f.fileno())  # the mark must not come before what it speaks of
                        f.seek(-4, os.SEEK_CUR)
                        f.write(np.float32(1).tobytes())
                        f.flush()
        self.ranks.barrier()
        with self.ranks.first() as alone:
            if alone and not file.exists():
                with contextlib.suppress(FileNotFoundError):  # the other run was here between the two lines
                    there = np.memmap(part, np.float32, "r", shape=shape)
                    assert all(there[block[-1], -1, -1] == 1 for block in blocks), f"{part} lacks blocks that some rank made"
                    part.replace(file)
            if alone and file.stat().st_size != 4 * math.prod(shape):
                raise UsageError(f"{self.name}: its losses in {file} are not those of these {len(rows)} rows; remove that file")
        return np.memmap(file, np.float32, "r", shape=shape)
