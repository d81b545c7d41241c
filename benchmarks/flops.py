"""FLOPs of products and attention in whatever a function does, forward and backward."""

import torch
from torch.utils import flop_counter


def counted_flops(function):
    """What torch's counter knows, and two things it does not: the CPU's attention kernel and in-place products.

    Attention is causal, so half of its pairs are counted.
    """
    aten = torch.ops.aten
    further = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v) // 2,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            flop_counter.sdpa_backward_flop_count(grad, q, k, v) // 2
        ),
        aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=further) as counter:
        function()
    return counter.get_total_flops()
