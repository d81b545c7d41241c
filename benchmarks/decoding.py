"""Speed of decoding: `transformers` plain and by prompt lookup, ours plain and with 2..H heads.

    python benchmarks/decoding.py MODEL [MODEL ..] [--rounds 5] [--tokens 64] [--batches 1 8 32]

MODEL: a run folder, or a Hugging Face folder (one head: plain decoding only). All forms read the
same weights and prompts in one process and take turns: greedy, a fixed number of new tokens,
prompts of 64 tokens of --data (held-out text, `stdlib` by default). Figures are medians over rounds
with least and most, by the clock; a speed-up is the median of the rounds' ratios. One thread.

Prompt lookup drafts what followed the same words earlier, without heads, one row at a time. Tokens
a pass leave out the prompt's own pass. Efficiency: speed-up divided by passes saved (1: no loss).
"""

import functools
import statistics
import time
from pathlib import Path

import tools


def theirs(plain, batches, count, **settings):
    """New tokens of every prompt by `transformers`, passes, and tokens a row gets from a pass."""
    import torch

    texts, passes = [], []
    hook = plain.register_forward_hook(lambda *_: passes.append(1))
    for batch in batches:
        x_BT = torch.tensor(batch)
        options = dict(max_new_tokens=count, do_sample=False, pad_token_id=0, **settings)
        output = plain.generate(x_BT, attention_mask=torch.ones_like(x_BT), **options)
        texts += output[:, x_BT.shape[1] :].tolist()
    hook.remove()
    return texts, len(passes), len(batches) * (count - 1) / (len(passes) - len(batches))


def ours(model, batches, count, num_heads):
    from common import generate

    done = [generate(model, batch, count, None, num_heads=num_heads) for batch in batches]
    texts = [text for one in done for text in one.tokens]
    new, steps = sum(one.new_tokens for one in done), sum(one.row_steps for one in done)
    return texts, sum(one.forwards for one in done), new / steps


def prompts_of(data, number):
    """Beginnings of 64 tokens of one document each, from all over the held-out text."""
    rows = data.heldout[:]
    same_BT = rows["document"][:, :64] == rows["document"][:, :1]
    whole = rows["input_ids"][:, :64][same_BT.all(1)].tolist()
    return [whole[i * len(whole) // number] for i in range(number)]


def measure(name, args):
    """A row for every batch size and form of one model."""
    import torch
    import transformers

    from common import Ranks, build_model, load_data, load_mtp

    model = load_mtp(name).eval()
    num_heads, rows = len(model.heads.layers), []
    _, tokenizer = build_model(name, num_heads)
    folder = Path(name) / "model" if (Path(name) / "model").exists() else name
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain.generation_config.eos_token_id = None
    data = load_data(tools.data_args(args.data), tokenizer, Ranks())
    for size in args.batches:
        prompts = prompts_of(data, max(args.prompts, size))
        batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        forms = {"transformers": functools.partial(theirs, plain, batches, args.tokens)}
        if size == 1:
            lookup = dict(prompt_lookup_num_tokens=args.lookup)
            forms["prompt lookup"] = functools.partial(forms["transformers"], **lookup)
        for k in sorted({1, num_heads} | {k for k in args.heads if k <= num_heads}):
            forms[f"{k} heads"] = functools.partial(ours, model, batches, args.tokens, k)
        seconds, results = {form: [] for form in forms}, {}
        for number in range(args.rounds + 1):  # the first is not counted
            for form in tools.in_turn(forms, number):
                began = time.perf_counter()
                results[form] = forms[form]()
                if number:
                    seconds[form].append(time.perf_counter() - began)
        for form, (texts, passes, tokens_per_pass) in results.items():
            base = "1 heads" if form.endswith("heads") else "transformers"
            saved = results[base][1] / passes
            to_plain = tools.ratios(seconds[base], seconds[form])
            row = dict(model=Path(name).name, batch=size, form=form, passes=passes)
            row["tokens_per_pass"] = tokens_per_pass
            row["tokens_per_s"] = len(prompts) * args.tokens / statistics.median(seconds[form])
            row["to_plain"] = tools.spread(to_plain)
            row["efficiency"] = tools.spread(ratio / saved for ratio in to_plain)
            to_theirs = tools.ratios(seconds["transformers"], seconds[form])
            row["to_transformers"] = tools.spread(to_theirs)
            row["same_text"] = texts == results["transformers"][0]
            rows.append(row)
    return rows


def show(rows):
    header, cells = "model, batch|form|tokens a pass|to plain|efficiency|to `transformers`|text", []
    for r in rows:
        keys = ("to_plain", "efficiency", "to_transformers")
        figures = [f"{r['tokens_per_pass']:.2f}", *(tools.shown(r[key]) for key in keys)]
        text = "same" if r["same_text"] else "other"
        cells.append([f"{r['model']}, {r['batch']}", r["form"], *figures, text])
    tools.print_table(header.split("|"), cells)


def main():
    parser = tools.parser(__doc__, rounds=5)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--heads", type=int, nargs="+", default=[2, 3, 4, 8], help="beside 1, H")
    parser.add_argument("--prompts", type=int, default=8, help="at least; a batch needs its own")
    parser.add_argument("--lookup", type=int, default=10, help="drafts of prompt lookup")
    args = parser.parse_args()
    tools.quiet()
    rows = [row for name in args.models for row in measure(name, args)]
    record = dict(command=tools.command(), **tools.machine(), rounds=args.rounds, threads=1)
    record |= dict(new_tokens=args.tokens, prompts=args.prompts, lookup=args.lookup, rows=rows)
    tools.write_json(args.out, record)
    show(rows)


if __name__ == "__main__":
    main()
