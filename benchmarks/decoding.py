"""Tokens per second of decoding: `transformers` `generate`, ours plain, ours with 2..H heads; where the wall clock goes.

    python benchmarks/decoding.py MODEL [MODEL ...] [--rounds 5] [--tokens 64] [--threads 1]

MODEL: a run folder, or a Hugging Face folder (one head: plain decoding alone). All forms read the same weights and prompts
in one process and take turns; greedy, fixed number of new tokens, prompts from held-out text (a run's own; else of --data
stdlib). Seconds are wall clock: medians over rounds with least and most; a speed-up is the median of the rounds' ratios.
CPU seconds of the process stand beside them: with one thread they are what the wall clock shows on a core of one's own.

Parts of a pass (ms of CPU) come from rounds of their own with clocks around functions. Each part counts its own time alone,
so the parts add up to `whole`, the same rounds' time for everything:
    trunk: layers below the heads. head 1, heads 2..H: their layers. embedding and norm: the rest of the decoder. masks: masks
    and cache positions. logits, verify, propose: unembedding, comparison, drafts. loop: the rest, Python of `generate`.

Text gained against time lost: CPU speed-up = passes saved / lost, with passes saved = plain passes / passes with drafts, and
lost = ms of a pass with drafts / ms of a plain pass.
Prints tables and writes decoding.json beside this file (--out).
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402
import decoding  # noqa: E402
import evaluate  # noqa: E402
from runs import commit  # noqa: E402


class Clock:
    """Seconds by part; a part that runs inside another one is taken out of it."""

    def __init__(self):
        self.seconds, self.inside = {}, []

    def around(self, owner, name, part):
        """Time `owner.name` as `part` from now on."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args, **kwargs):
            began = time.process_time()
            self.inside.append(0.0)
            try:
                return inner(*args, **kwargs)
            finally:
                taken = time.process_time() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + taken - self.inside.pop()
                if self.inside:
                    self.inside[-1] += taken

        setattr(owner, name, timed)
        return functools.partial(setattr, owner, name, inner)


def spread(values, digits=4):
    return [round(v, digits) for v in (statistics.median(values), min(values), max(values))]


def parts_of_a_pass(model, batches, args, num_heads):
    """Median ms of each part of a pass over the rounds, and of the whole."""
    clock, rounds = Clock(), []
    heads = model.heads.layers
    undo = [clock.around(layer, "forward", "trunk") for layer in model.trunk_layers]
    undo += [clock.around(layer, "forward", "heads 2..H" if n else "head 1") for n, layer in enumerate(heads)]
    undo += [
        clock.around(model.causal_lm.model, "forward", "embedding and norm"),
        clock.around(decoding._Decoder, "states", "masks"),
        clock.around(decoding._Decoder, "logits", "logits"),
        clock.around(decoding._Decoder, "propose", "propose"),
        clock.around(decoding, "verify", "verify"),
        clock.around(decoding, "generate", "loop"),
    ]
    for _ in range(args.rounds):
        clock.seconds = {}
        began = time.process_time()
        passes = sum(d.forwards for d in ours(model, batches, args.tokens, num_heads)[1])
        rounds.append(
            {k: 1000 * v / passes for k, v in clock.seconds.items()} | {"whole": 1000 * (time.process_time() - began) / passes}
        )
    for restore in undo:
        restore()
    middle = sorted(rounds, key=lambda r: r["whole"])[len(rounds) // 2]  # one round's parts, so that they add up
    assert abs(sum(middle.values()) - 2 * middle["whole"]) < 0.02 * middle["whole"], middle
    return {k: round(v, 4) for k, v in middle.items()}


def theirs(plain, batches, count):
    """New tokens of every prompt by `transformers`, and nothing else to tell."""
    texts = []
    for batch in batches:
        x_BT = torch.tensor(batch)
        made = plain.generate(x_BT, attention_mask=torch.ones_like(x_BT), max_new_tokens=count, do_sample=False, pad_token_id=0)
        texts += made[:, x_BT.shape[1] :].tolist()
    return texts, []


def ours(model, batches, count, num_heads):
    """New tokens of every prompt, and what `generate` returned for each batch."""
    done = [decoding.generate(model, batch, count, None, num_heads=num_heads) for batch in batches]
    return [text for d in done for text in d.tokens], done


def measure(name, args):
    """Rows of one model, batch 1 and 8, every form."""
    model = common.load_mtp(name).eval()
    folder = common.model_dir(name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.generation_config.eos_token_id = None
    tokenizer = common.load_tokenizer(folder)
    record = Path(name) / "args.json"
    record = json.loads(record.read_text()) if record.exists() else {}
    data, _ = evaluate.load_heldout(evaluate.Args(), record, model, tokenizer, common.Ranks())
    prompts = [p for p in evaluate.beginnings(data, args.prompts + 1) if len(p) == 64][: args.prompts]  # theirs needs one length
    H, rows = len(model.heads.layers), []
    for size in args.batches:
        batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        forms = {"transformers": functools.partial(theirs, plain, batches, args.tokens)}
        for k in range(1, H + 1):
            forms[f"{k} heads"] = functools.partial(ours, model, batches, args.tokens, k)
        seconds, cpu, texts, done, passes = {form: [] for form in forms}, {form: [] for form in forms}, {}, {}, {}
        loads = []
        for number in range(args.rounds + 1):  # the first is not counted
            loads.append(os.getloadavg()[0])
            for form in list(forms) if number % 2 else reversed(forms):
                began, cpu_began = time.perf_counter(), time.process_time()
                texts[form], done[form] = forms[form]()
                if number:
                    seconds[form].append(time.perf_counter() - began)
                    cpu[form].append(time.process_time() - cpu_began)
        for k, form in enumerate(forms):
            bases = ("transformers", "1 heads")
            against = {base: spread([a / b for a, b in zip(seconds[base], seconds[form])]) for base in bases}
            cpu_against = {base: spread([a / b for a, b in zip(cpu[base], cpu[form])]) for base in bases}
            row = {
                "model": Path(name).name,
                "batch": size,
                "form": form,
                "seconds": spread(seconds[form]),
                "tokens_per_s": spread([args.prompts * args.tokens / s for s in seconds[form]], 1),
                "speedup_to_transformers": against["transformers"],
                "speedup_to_plain": against["1 heads"],
                "cpu_seconds": spread(cpu[form]),
                "cpu_speedup_to_transformers": cpu_against["transformers"],
                "cpu_speedup_to_plain": cpu_against["1 heads"],
                "load_average": spread(loads, 2),
                "same_text_as_transformers": texts[form] == texts["transformers"],
            }
            if done[form]:
                passes[form] = sum(d.forwards for d in done[form])
                row_steps, new = sum(d.row_steps for d in done[form]), sum(d.new_tokens for d in done[form])
                row |= {
                    "tokens_per_pass": round(new / row_steps, 4),
                    "accepted_by_draft": [round(float(a) / row_steps, 4) for a in sum(d.accepted for d in done[form])],
                    "passes": passes[form],
                    "ms_per_pass": spread([1000 * s / passes[form] for s in seconds[form]]),
                }
                # passes of the batch end with its slowest row, and rows that have ended leave: both are in this quotient
                row["passes_saved"] = round(passes["1 heads"] / passes[form], 4)
                row["lost"] = round(row["passes_saved"] / row["cpu_speedup_to_plain"][0], 4)
                if k in {1, 2, H}:
                    row["parts_ms"] = parts_of_a_pass(model, batches, args, k)
            rows.append(row)
            print(
                f"{row['model'][:16]:16} batch {size}  {form:12} {row['tokens_per_s'][0]:8.1f} tokens/s"
                f"  to transformers {against['transformers'][0]:5.2f}  to plain {against['1 heads'][0]:5.2f}"
                f"  (CPU {cpu_against['transformers'][0]:5.2f} {cpu_against['1 heads'][0]:5.2f})"
                + (f"  tokens/pass {row['tokens_per_pass']:.2f}  ms/pass {row['ms_per_pass'][0]:.2f}" if done[form] else "")
                + ("" if row["same_text_as_transformers"] else "  OTHER TEXT"),
                flush=True,
            )
            if "parts_ms" in row:
                print("   " + "  ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms"].items()), flush=True)
    sizes = {
        "model": Path(name).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trunk_layers": len(model.trunk_layers),
        "heads": H,
    }
    return sizes, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=8, help="at batch 1 one after the other")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    measured = [measure(name, args) for name in args.models]
    machine = {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": args.threads,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    settings = {"rounds": args.rounds, "new_tokens": args.tokens, "prompts": args.prompts}
    command = " ".join(["python benchmarks/decoding.py", *(Path(n).name for n in args.models), *sys.argv[1 + len(args.models) :]])
    what = {"command": command, **commit()}
    what |= {
        "machine": machine,
        **settings,
        "models": [m for m, _ in measured],
        "rows": [r for _, rows in measured for r in rows],
    }
    Path(args.out).write_text(json.dumps(what, indent=1) + "\n")


if __name__ == "__main__":
    main()
