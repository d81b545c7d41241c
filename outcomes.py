"""Records with an outcome: where their rewards come from, and which are siblings.

A record has `prompt`, `completion`, `reward` (0 to 1; above `CORRECT` it counts as correct), `group` (records that must stay on
one side of the split), `sibling` (number of the task that it and its siblings solve) and the characters `fault_start` to
`fault_end` of its completion that hold the fault, -1 where it is not known. Faults are there to judge a value: no batch holds
them.

Shapes: N records.
"""

import collections
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch

from common import UsageError, first_line

CORRECT = 0.5  # a record is correct if its reward is above
TAGS = {True: "# right\n", False: "# wrong\n"}  # equally long


# --------------------------------------------------------------------------------------------------------------- records
def read_pairs(loaded):
    """Records of data in the layout of ConDefects or of CodeContests; None for any other."""
    import datasets

    columns, records = set(loaded.column_names), []
    if {"correct", "faulty", "fault_location"} <= columns:  # 2310.16253; no statements, so the task's name is the prompt
        for number, pair in enumerate(loaded):
            lines = re.findall(r"[^\n]*\n|[^\n]+", pair["faulty"] or "")
            named = [int(n) for n in re.findall(r"\d+", str(pair["fault_location"]))]  # of several lines the first
            at = named[0] - 1 if named and 1 <= named[0] <= len(lines) else None
            start = -1 if at is None else sum(map(len, lines[:at]))
            end = -1 if at is None else start + len(lines[at])
            same = dict(prompt=f"# {pair.get('task', number)}\n", group=str(pair.get("task", number)), sibling=number)
            records.append(same | dict(reward=1.0, fault_start=-1, fault_end=-1, completion=pair["correct"]))
            records.append(same | dict(reward=0.0, fault_start=start, fault_end=end, completion=pair["faulty"]))
    elif {"description", "solutions", "incorrect_solutions"} <= columns:  # as many wrong as right
        for number, problem in enumerate(loaded):
            sides = []
            for name in ("solutions", "incorrect_solutions"):
                of = problem[name]
                each = of if isinstance(of, list) else [dict(zip(of, values)) for values in zip(*of.values())]
                sides.append([s["solution"] for s in each if s["language"] in (3, "PYTHON3") and s["solution"]])
            prompt = (
                f"You are an expert Python programmer, and here is your task: {problem['description']}\n"
                "Your program should read standard input and write standard output.\n[BEGIN]\n"
            )
            same = dict(prompt=prompt, group=str(number), sibling=number, fault_start=-1, fault_end=-1)
            for right, wrong in zip(*sides):
                records += [same | dict(reward=1.0, completion=right), same | dict(reward=0.0, completion=wrong)]
    else:
        return None
    return datasets.Dataset.from_list([r for r in records if r["completion"]])


def with_rewards(documents, name, reward_model, device, say):
    """Records with reward, group, sibling and fault; unchanged where nothing gives them an outcome.

    Where no group is named, the records of one prompt are siblings and stay on one side of the split. A reward must be true,
    false or a number from 0 to 1; records that lack one are scored by `reward_model`, if it is named.

    Raises:
        UsageError: a reward is missing or outside of [0, 1].
    """
    if "prompt" not in documents.column_names or not (reward_model or "reward" in documents.column_names):
        return documents
    reward_N = documents["reward"][:] if "reward" in documents.column_names else [None] * len(documents)
    try:
        reward_N = np.array([np.nan if r is None else float(r) for r in reward_N])
    except (TypeError, ValueError):
        raise UsageError(f"--data {name}: the column reward holds something else than numbers from 0 to 1") from None
    missing = np.flatnonzero(np.isnan(reward_N))
    if len(missing) and not reward_model:
        raise UsageError(f"--data {name}: record {missing[0] + 1} has no reward; critic_wmtp.py --reward-model scores it")
    if len(missing):
        say(f"rewards   of {len(missing):,} of {len(reward_N):,} records from --reward-model {reward_model}")
        chosen = documents.select(missing)
        reward_N[missing] = scores(reward_model, chosen["prompt"][:], chosen["completion"][:], device)
    if len(bad := np.flatnonzero((reward_N < 0) | (reward_N > 1))):
        raise UsageError(f"--data {name}: record {bad[0] + 1} has the reward {reward_N[bad[0]]:g}; from 0 to 1")
    numbers = np.unique(documents["prompt"][:], return_inverse=True)[1].tolist()
    columns = {"group": numbers, "sibling": numbers, "fault_start": [-1] * len(numbers), "fault_end": [-1] * len(numbers)}
    columns |= {c: documents[c][:] for c in columns if c in documents.column_names}
    made = dict(prompt=documents["prompt"][:], reward=reward_N.tolist(), **columns, completion=documents["completion"][:])
    return type(documents).from_dict(made)


def with_tags(documents, all_good):
    """Records whose prompt begins with a line that says the outcome; with `all_good` each is said to be correct."""
    prompts = [TAGS[all_good or reward > CORRECT] + prompt for prompt, reward in zip(documents["prompt"], documents["reward"])]
    return documents.remove_columns("prompt").add_column("prompt", prompts).select_columns(documents.column_names)


@torch.no_grad()
def scores(name, prompts, completions, device, batch_size=16):
    """Rewards from 0 to 1 of a Hugging Face sequence classifier, read with its classification head, once: they are kept.

    One output is a logit: sigmoid. Of two the second is the correct class: softmax. The text is prompt and completion.

    Raises:
        UsageError: no such model, another number of outputs, or a classification head that its files do not hold.
    """
    import datasets
    import transformers

    try:
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        model, found = load(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what a broken folder raises has no common class
        raise UsageError(f"--reward-model {name}: cannot be read as a sequence classifier ({first_line(error)})") from None
    if found["missing_keys"] or found["mismatched_keys"]:
        lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        raise UsageError(f"--reward-model {name}: lacks {lacking[0]}, so it is no trained classifier; name a reward model")
    if model.config.num_labels not in (1, 2):
        raise UsageError(f"--reward-model {name}: has {model.config.num_labels} outputs; 1 (a logit) or 2 (wrong, correct) fit")
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"  # of a long text the end counts
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders read the last token that is no padding
    rules = str(getattr(tokenizer, "backend_tokenizer", tokenizer)), model.config.to_json_string()
    own = sorted(tokenizer.get_vocab().items()), *rules
    digest = hashlib.sha256(repr((own, prompts, completions)).encode("utf-8", "replace"))
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    file = Path(datasets.config.HF_DATASETS_CACHE) / "wmtp" / f"rewards-{digest.hexdigest()[:32]}.npy"
    if not file.exists():
        model, longest = model.to(device).eval(), getattr(model.config, "max_position_embeddings", None)
        texts, rewards = [p + c for p, c in zip(prompts, completions)], []
        for first in range(0, len(texts), batch_size):
            options = dict(padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt")
            inputs = tokenizer(texts[first : first + batch_size], **options).to(device)
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
            rewards.append(torch.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else torch.softmax(logits, -1)[:, 1])
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp.npy")
        np.save(temporary, torch.cat(rewards).cpu().double().numpy())
        temporary.replace(file)
    return np.load(file)


def partners(rows, copies):
    """For every row the number of the next sibling row of the other outcome, cyclically (the row itself if there is none), and
    its share: what it must count for so that all rows count alike where each comes with its partner (`copies` 2).
    """
    correct_N, of = np.array(rows["reward"][:]) > CORRECT, collections.defaultdict(lambda: ([], []))
    sibling_N = np.array(rows["sibling"][:]).tolist()
    for number, sibling in enumerate(sibling_N):
        of[sibling][int(correct_N[number])].append(number)
    partner_N = np.arange(len(correct_N))
    for wrong, right in of.values():
        for own, other in ((wrong, right), (right, wrong)):
            if other:
                partner_N[own] = [other[i % len(other)] for i in range(len(own))]
    drawn_N = 1 + np.bincount(partner_N, minlength=len(partner_N)) * (copies - 1)
    return partner_N, (1 / drawn_N).astype(np.float32)


def completion_lengths(rows):
    """Tokens of each row's completion, with the end of sequence, `[N]`."""
    return np.concatenate([block["is_target"].sum(1) for block in rows.iter(1000)])


def check_outcomes(data, name):
    """Refuse data from which no value can be learnt.

    Raises:
        UsageError: no rewards, all alike, or a completion of one token.
    """
    if data.heldout_records is None:
        lacks = "add a column reward (0 to 1), or to records with prompt and completion a --reward-model"
        raise UsageError(f"--data {name}: has no rewards; {lacks}")
    reward_N = np.array(data.train["reward"][:])
    if reward_N.min() == reward_N.max():
        raise UsageError(f"--data {name}: all {len(reward_N)} rewards are {reward_N[0]:g}; a value needs right and wrong records")
    length_N = completion_lengths(data.train)
    if (length_N < 3).any():
        row = f"training row {length_N.argmin() + 1} has a completion of {length_N.min() - 1} token(s)"
        raise UsageError(f"--data {name}: {row}; advantages compare the tokens of a completion, so at least 2")
