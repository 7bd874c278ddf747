"""
Quantization for sampling: linear layers with 16-bit weights (weight-only) or in int8 (dynamic).

A new token reads every weight once, so on most machines sampling is limited by memory bandwidth.
Fewer bits are read faster.

Not here: the choice of the dtype (device.py), sampling (generation.py).
"""
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.device import has_bfloat16, has_fbgemm

LONG_INPUT = 32  # tokens per row from which a layer is compute-bound


def quantize_linears(model, dtype, int8=False, compile=False):
    """
    Replaces every nn.Linear of `model` by a QuantizedLinear, in place; then it can no longer train.
    Subclasses of nn.Linear stay, as they may compute something else.

    Args:
        dtype: torch.dtype of the weights
        int8: whether single tokens are multiplied in int8; requires FBGEMM
        compile: leaves out FBGEMM's kernels, which torch.compile cannot have in a graph
    """
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            setattr(model, name, QuantizedLinear(child, dtype, int8, compile))
        else:
            quantize_linears(child, dtype, int8, compile)


class QuantizedLinear(nn.Module):
    """
    A linear layer for inference: (B, T, in) -> (B, T, out). Arguments as in quantize_linears().

    On a CPU with the kernels of FBGEMM, in float16 and with int8:
        short inputs: float16 weights, multiplied in float32
        long inputs: bfloat16 where the CPU has it, else float32 with weights stored in float16
        with int8, single tokens: int8 weights
    Elsewhere all inputs are multiplied in `dtype`.

    Prompts are not multiplied in int8, because the activations of their first token have outliers
    that would cost the other tokens their precision.
    """

    def __init__(self, linear, dtype, int8=False, compile=False):
        assert not (int8 and compile)
        super().__init__()
        weight = linear.weight.detach()                                     # (out, in)
        bias = linear.bias
        if bias is not None:
            bias = bias.detach()                                            # (out,)

        self.dtype = dtype  # of products
        stored_dtype = dtype
        self.packed_float16 = None
        self.packed_int8 = None
        if int8 or (dtype == torch.float16 and has_fbgemm(weight.device.type)):
            if has_bfloat16():
                self.dtype = torch.bfloat16
                stored_dtype = torch.bfloat16
            else:
                self.dtype = torch.float32
            if int8:
                self.packed_int8 = pack_int8(weight, bias)
            if not compile and not (int8 and has_bfloat16()):
                self.packed_float16 = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.weight = weight.to(stored_dtype)
        self.bias = bias
        if bias is not None:
            self.bias = bias.to(self.dtype)

    def forward(self, x):
        T = x.shape[1]
        if self.packed_int8 is not None and T == 1:
            # x is rounded to 7 bits of the batch's range, as 8 overflow on CPUs without VNNI
            reduce_range = True
            return torch.ops.quantized.linear_dynamic(x.float(), self.packed_int8, reduce_range)
        if self.packed_float16 is not None and T < LONG_INPUT:
            return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed_float16)
        y = F.linear(x.to(self.dtype), self.weight.to(self.dtype), self.bias)
        if y.device.type == 'cpu':
            return y.float()  # as FBGEMM's kernels give it: all keys in a cache have one dtype
        return y


def pack_int8(weight, bias):
    """ Rounds a weight (out, in) to int8, scaled per row, and packs it for FBGEMM. """
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-9)                # (out,)
    zero_point = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings(action='ignore'):  # of torch, which may drop these tensors one day
        quantized = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, bias)
