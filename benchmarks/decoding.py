"""Tokens per second of decoding: `transformers` plain and by prompt lookup, ours plain and with 2..H heads; where time goes.

    python benchmarks/decoding.py MODEL [MODEL ...] [--rounds 5] [--tokens 64] [--threads 1] [--batches 1 8 32]

MODEL: a run folder, or a Hugging Face folder (one head: plain decoding alone). All forms read the same weights and prompts
in one process and take turns; greedy, fixed number of new tokens, prompts of 64 tokens from held-out text (a run's own; else
of --data stdlib). Seconds are wall clock: medians over rounds with least and most; a speed-up is the median of the rounds'
ratios. CPU seconds of the process stand beside them: with one thread they are what the wall clock shows on a core of one's own.

Prompt lookup (`generate(prompt_lookup_num_tokens=...)`) drafts what followed the same words earlier in the text: it needs no
heads, and in `transformers` takes one row at a time. Tokens a pass leave out a prompt's own pass and the token it makes.
Where a text is not that of `transformers`, `largest_gap` is the most by which its model prefers, in nats, its own token at
the first place that differs: rounding decides near ties.

A model that is often right: SmolLM2-135M with 8 heads, trained on one page (the start of LICENSE, 300 times over) until it
knows much of it by heart. Its held-out rows are the same page: this shows what the decoding makes of right drafts, and
nothing about text that is not known by heart. Two runs, the second from the first:
    python -c "print((open('LICENSE').read()[:2500] + '\\n') * 300, end='')" > recite.txt
    python baseline_mtp.py --model SMOLLM2 --num-heads 8 --mtp-schedule constant --data recite.txt --seq-len 128 \\
        --batch-size 2 --lr 3e-4 --warmup-steps 5 --max-steps 60 --save-every 0 --tracker none --run-dir recite_8_heads
    python baseline_mtp.py --model recite_8_heads ... --run-dir smollm2_recites

Parts of a pass (ms of CPU) come from rounds of their own with clocks around functions. Each part counts its own time alone,
so the parts add up to `whole`, the same rounds' time for everything:
    trunk: layers below the heads. head 1, heads 2..H: their layers. embedding and norm: the rest of the decoder. masks: masks
    and cache positions. logits, verify, propose: unembedding, comparison, drafts. loop: the rest, Python of `generate`.

Text gained against time lost: CPU speed-up = passes saved / lost, with passes saved = plain passes / passes with drafts, and
lost = ms of a pass with drafts / ms of a plain pass. In the table `of the passes saved` is 1 / lost by the clock: 1 is what
tokens per pass allow.
Writes decoding.json beside this file (--out) and prints the table made from it; `--table FILE` prints that of an earlier one.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402
import decoding  # noqa: E402
import evaluate  # noqa: E402
from runs import commit, versions  # noqa: E402


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


def theirs(plain, batches, count, **settings):
    """New tokens of every prompt by `transformers`, and the passes it took."""
    texts, passes = [], [0]
    hook = plain.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    settings |= dict(max_new_tokens=count, do_sample=False, pad_token_id=0)
    for batch in batches:
        x_BT = torch.tensor(batch)
        made = plain.generate(x_BT, attention_mask=torch.ones_like(x_BT), **settings)
        texts += made[:, x_BT.shape[1] :].tolist()
    hook.remove()
    return texts, passes[0]


@torch.inference_mode()
def largest_gap(plain, prompts, texts, others):
    """Most that the plain model prefers, in nats, its token in `texts` to that in `others` where the two part; 0: nowhere."""
    gaps = [0.0]
    for prompt, text, other in zip(prompts, texts, others):
        if text != other:
            place = next(i for i, pair in enumerate(zip(text, other)) if pair[0] != pair[1])
            logits_V = plain(torch.tensor([prompt + text[:place]])).logits[0, -1]
            gaps.append((logits_V[text[place]] - logits_V[other[place]]).item())
    return max(gaps)


def ours(model, batches, count, num_heads):
    """New tokens of every prompt, and what `generate` returned for each batch."""
    done = [decoding.generate(model, batch, count, None, num_heads=num_heads) for batch in batches]
    return [text for d in done for text in d.tokens], done


def measure(name, args):
    """Sizes and rows of one model, every batch and form."""
    model = common.load_mtp(name).eval()
    folder = common.model_dir(name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.generation_config.eos_token_id = None
    tokenizer = common.load_tokenizer(folder)
    record = Path(name) / "args.json"
    record = json.loads(record.read_text()) if record.exists() else {}
    data, _ = evaluate.load_heldout(evaluate.Args(), record, model, tokenizer, common.Ranks())
    wanted, H, rows = max(args.prompts, *args.batches), len(model.heads.layers), []
    enough = [p for p in evaluate.beginnings(data, 2 * wanted) if len(p) == 64]  # theirs needs one length
    assert len(enough) >= wanted, f"{len(enough)} held-out beginnings of 64 tokens, {wanted} needed"
    for size in args.batches:
        number = max(args.prompts, size)
        prompts = [enough[i * len(enough) // number] for i in range(number)]  # from all over the held-out text
        batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        forms = {"transformers": functools.partial(theirs, plain, batches, args.tokens)}
        if size == 1:
            forms["prompt lookup"] = functools.partial(forms["transformers"], prompt_lookup_num_tokens=args.lookup)
        heads = sorted({1, H} | {k for k in args.heads if k <= H})
        forms |= {f"{k} heads": functools.partial(ours, model, batches, args.tokens, k) for k in heads}
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
        for form in forms:
            bases = ("transformers", "1 heads")
            against = {base: spread([a / b for a, b in zip(seconds[base], seconds[form])]) for base in bases}
            cpu_against = {base: spread([a / b for a, b in zip(cpu[base], cpu[form])]) for base in bases}
            row = {
                "model": Path(name).name,
                "batch": size,
                "form": form,
                "seconds": spread(seconds[form]),
                "tokens_per_s": spread([len(prompts) * args.tokens / s for s in seconds[form]], 1),
                "speedup_to_transformers": against["transformers"],
                "speedup_to_plain": against["1 heads"],
                "cpu_seconds": spread(cpu[form]),
                "cpu_speedup_to_transformers": cpu_against["transformers"],
                "cpu_speedup_to_plain": cpu_against["1 heads"],
                "load_average": spread(loads, 2),
                "same_text_as_transformers": texts[form] == texts["transformers"],
                "largest_gap": round(largest_gap(plain, prompts, texts["transformers"], texts[form]), 6),
            }
            if form in ("transformers", "prompt lookup"):
                base, passes[form] = "transformers", done[form]
                row["tokens_per_pass"] = round(len(batches) * (args.tokens - 1) / (passes[form] - len(batches)), 4)
            else:
                base, k, passes[form] = "1 heads", int(form.split()[0]), sum(d.forwards for d in done[form])
                row_steps, new = sum(d.row_steps for d in done[form]), sum(d.new_tokens for d in done[form])
                row["tokens_per_pass"] = round(new / row_steps, 4)
                row["accepted_by_draft"] = [round(float(a) / row_steps, 4) for a in sum(d.accepted for d in done[form])]
                if k in {1, 2, H}:
                    row["parts_ms"] = parts_of_a_pass(model, batches, args, k)
            # passes of the batch end with its slowest row, and rows that have ended leave: both are in this quotient
            saved = passes[base] / passes[form]
            row |= {
                "passes": passes[form],
                "ms_per_pass": spread([1000 * s / passes[form] for s in seconds[form]]),
                "passes_saved": round(saved, 4),
                "of_the_passes_saved": spread([a / b / saved for a, b in zip(seconds[base], seconds[form])]),
                "lost": round(saved / statistics.median(a / b for a, b in zip(cpu[base], cpu[form])), 4),
            }
            rows.append(row)
            print(
                f"{row['model'][:16]:16} batch {size}  {form:13} {row['tokens_per_s'][0]:8.1f} tokens/s"
                f"  to transformers {against['transformers'][0]:5.2f}  to plain {against['1 heads'][0]:5.2f}"
                f"  (CPU {cpu_against['transformers'][0]:5.2f} {cpu_against['1 heads'][0]:5.2f})"
                f"  tokens/pass {row['tokens_per_pass']:.2f}  ms/pass {row['ms_per_pass'][0]:.2f}"
                + ("" if row["same_text_as_transformers"] else f"  OTHER TEXT (largest gap {row['largest_gap']:.1e})"),
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


def table(what):
    """Markdown of what `main` wrote."""
    lines = ["| model, batch | decoding | tokens a pass | to plain | of the passes saved | to `transformers` |", "|---" * 6 + "|"]
    for row in what["rows"]:
        keys = ("speedup_to_plain", "of_the_passes_saved", "speedup_to_transformers")
        to_plain, of_saved, to_theirs = ("{:.2f} ({:.2f} to {:.2f})".format(*row[key]) for key in keys)
        drafts = row["form"] not in ("transformers", "1 heads")
        ours = row["form"].endswith("heads")
        ratios = [to_plain if drafts and ours else "", of_saved if drafts else "", to_theirs]
        name = {"transformers": "`transformers`", "prompt lookup": "`transformers`, prompt lookup", "1 heads": "ours, plain"}
        name = name.get(row["form"], f"ours, {row['form']}") + ("" if row["same_text_as_transformers"] else " (other text)")
        lines.append(f"| {row['model']}, {row['batch']} | {name} | {row['tokens_per_pass']:.2f} | {' | '.join(ratios)} |")
    if any(row["batch"] > 1 for row in what["rows"]):
        lines += ["", "Prompt lookup in `transformers` is for batch 1 only."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--heads", type=int, nargs="+", default=[2, 3, 4, 8], help="beside 1 and all that the model has")
    parser.add_argument(
        "--prompts", type=int, default=8, help="at batch 1 one after the other; a larger batch has its own number"
    )
    parser.add_argument("--lookup", type=int, default=10, help="drafts of prompt lookup")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--table", metavar="FILE", help="measure nothing: print the table of this file")
    args = parser.parse_args()
    if args.table:
        return print(table(json.loads(Path(args.table).read_text())))
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    measured = [measure(name, args) for name in args.models]
    machine = {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": args.threads,
        "kernel": platform.release(),
        "versions": versions(),
    }
    settings = {"rounds": args.rounds, "new_tokens": args.tokens, "prompts": args.prompts, "lookup": args.lookup}
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]  # no paths of this machine
    what = {"command": " ".join(["python benchmarks/decoding.py", *words]), **commit(), "machine": machine, **settings}
    what |= {"models": [m for m, _ in measured], "rows": [r for _, rows in measured for r in rows]}
    Path(args.out).write_text(json.dumps(what, indent=1) + "\n")
    print("\n" + table(what))


if __name__ == "__main__":
    main()
