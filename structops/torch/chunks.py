"""A chain over chunks of tokens, forward and backward: plain loops of products that write where the next one reads.

The state of a chunk stays in cache between one factor and the next, every product is a batched matmul of strided
operands into a buffer that exists already, and copies, where the order of the labels asks for one, happen in cache.
What was measured is in docs/speed.md.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structops.chain import Chain
from structops.program import Move, inverse

Shape = tuple[int, ...]
Limits = tuple[int, int, int]  # bytes and tokens of a chunk at most, and tokens at least


@dataclass
class Tuning:
    """What decides how a chain is computed; `structops.torch.tuning` is the one in use and may be changed.

    Attributes:
        chunk_bytes: Bytes of the intermediates and outputs of a chunk on a CPU: about half of the last cache.
        chunk_tokens: Most tokens of a chunk on a CPU.
        least_tokens: Fewest tokens of a chunk, whatever their bytes.
        kernel_numbers: Tokens times numbers between the factors, and of the output, from which chunks are worth their
            overhead if gradients are wanted and the output comes in more than 16 blocks.
        fused: Whether pairs of factors on a GPU run as one Triton kernel.  Off, since it was not measured yet; see
            docs/speed.md for where the roofline says that it should win.
    """

    chunk_bytes: int = 16 * 2**20
    chunk_tokens: int = 2047
    least_tokens: int = 63
    kernel_numbers: int = 2**17
    fused: bool = False

    @property
    def limits(self) -> Limits:
        """What sets the chunks: intermediates are kept chunk by chunk, so both passes have to agree on it."""
        return self.chunk_bytes, self.chunk_tokens, self.least_tokens


tuning = Tuning()


def chunks(tokens: int, most: int, lines: int) -> list[tuple[int, int]]:
    """Start and end of every chunk: near-equal, about ``most`` tokens at most, and odd if that matters.

    The copy between a state with the tokens inside and the output strides by the tokens of a chunk, over ``lines``
    places.  Where that stride is a multiple of a power of two, all fall on the same few sets of the cache: on the
    machine of docs/speed.md, chunks of 128 tokens were copied at 5 GB/s, of 127 at 25.  It takes more places than the 8
    ways of a cache; and up to 16 a second chunk costs more.
    """
    count = max(1, -(-tokens // most))
    odd = lines > 8 and tokens > 8
    if odd and (tokens - count) % 2:  # only as many odd numbers as this add up to the tokens
        odd = count > 1 or lines > 16
        count += odd
    sizes = [tokens // count] * count
    if odd:
        sizes = [size - 1 + size % 2 for size in sizes]
        for k in range((tokens - sum(sizes)) // 2):
            sizes[k % count] += 2
    else:
        for k in range(tokens - sum(sizes)):
            sizes[k] += 1
    ends = [sum(sizes[: k + 1]) for k in range(count)]
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True)]


class ChunkedChain:
    """The products of a chain, forward and backward, over chunks of the rows of x.

    Args:
        chain: A chain without regroups that cost a copy; see `supports`.  Padding is not its business.
        limits: Of the chunks.
    """

    def __init__(self, chain: Chain, limits: Limits) -> None:
        self.limits = limits
        self.chain, self.out_features = chain, chain.padded_out
        *self.products, self.output = chain.strided_moves
        self.widths = chain.intermediate_widths
        self.kept = sum(self.widths)
        self.lines = math.prod(self.output.state[: self.output.state.index(-1)])

    @staticmethod
    def supports(chain: Chain) -> bool:
        """Whether every move but the last is a product."""
        return all(move.factor for move in chain.strided_moves[:-1])

    def forward(self, x: Tensor, factors: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
        """The product with every row of x (tokens, in_features).

        Returns:
            y (tokens, out_features), and what `backward` needs beside x: the intermediates, flat, chunk after chunk; or
            an empty tensor if ``keep`` is false.
        """
        y = x.new_empty(x.shape[0], self.out_features)
        kept = x.new_empty(x.shape[0] * self.kept if keep else 0)
        weights = self._weights(factors)
        for start, end in self._chunks(x):
            states = self._states(x[start:end], weights, kept[start * self.kept : end * self.kept])
            self._last(states[-1], len(states) - 1, weights[-1], y[start:end])
        return y, kept

    def backward(
        self, grad: Tensor, x: Tensor, kept: Tensor, factors: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of x and of every factor, each an empty tensor where it is not ``needed``.

        Without kept intermediates they are computed again.
        """
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[0] else x.new_empty(0)
        weights = self._weights(factors)
        totals = [_Total() if need else None for need in needed[1:]]
        for start, end in self._chunks(x):
            part = kept[start * self.kept : end * self.kept]
            states = self._states(x[start:end], weights, part, given=kept.numel() > 0)
            self._descend(grad[start:end], states, weights, totals, dx[start:end])
        gradients = [
            x.new_empty(0) if total is None else total.gradient(move, factor)
            for total, move, factor in zip(totals, self.products, factors, strict=True)
        ]
        return [dx, *gradients]

    # ------------------------------------------------------------------------------------------------------- one chunk

    def _states(self, x: Tensor, weights: list[Tensor], kept: Tensor, given: bool = False) -> list[Tensor]:
        """What every product reads: x, then the intermediates, as given or computed into ``kept`` or scratch."""
        states, start = [x], 0
        for k, width in enumerate(self.widths):
            size = width * x.shape[0]
            state = kept[start : start + size] if kept.numel() else _scratch(f"state{k}", size, x)
            if not given:
                operand = self._operand(k, states[k])
                _product(weights[k], operand, state)
            states.append(state)
            start += size
        return states

    def _operand(self, k: int, state: Tensor) -> Tensor:
        """The state as the matrices that product k multiplies: a view, or a copy in cache."""
        move = self.products[k]
        labels = state.view(move.state).permute(move.axes)
        if not move.copies:
            return labels.reshape(move.matrix)
        return _scratch("operand", state.numel(), state).view(labels.shape).copy_(labels).view(move.matrix)

    def _last(self, state: Tensor, k: int, weight: Tensor, y: Tensor) -> None:
        """The last product, with the output in order."""
        operand = self._operand(k, state)
        if self.output.copies:
            product = _product(operand, weight.mT, _scratch("written", y.numel(), y))
            _ordered(y, self.output).copy_(product.view(self.output.state).permute(self.output.axes))
        else:
            _product(operand, weight.mT, y)

    def _descend(
        self, grad: Tensor, states: list[Tensor], weights: list[Tensor], totals: list[_Total | None], dx: Tensor
    ) -> None:
        """Add the gradients of the factors over one chunk to the totals, and write that of x."""
        flow = self._of_last(grad)
        for k in reversed(range(len(states))):
            move, weight, operand = self.products[k], weights[k], self._operand(k, states[k])
            total = totals[k]
            if total is not None:  # of the last transposed: the rows of its products are fan_in, often the larger side
                total.add(*((flow, operand.mT) if move.tokens_last else (operand.mT, flow)))
            if k == 0 and not dx.numel():
                return
            flow = self._below(k, flow, weight, operand, dx if k == 0 else None)

    def _of_last(self, grad: Tensor) -> Tensor:
        """The gradient of what the last product wrote, (blocks, tokens, fan_out)."""
        move = self.products[-1]
        shape = (*move.matrix[:-1], move.factor[-2])
        if not self.output.copies:
            return grad.reshape(shape)
        labels = _ordered(grad, self.output).permute(inverse(self.output.axes))
        return _scratch("written", grad.numel(), grad).view(labels.shape).copy_(labels).view(shape)

    def _below(self, k: int, flow: Tensor, weight: Tensor, operand: Tensor, dx: Tensor | None) -> Tensor:
        """The gradient of the operand of product k, in the layout of what product k - 1 wrote, or written to dx."""
        move = self.products[k]
        out = _scratch(f"down{k % 2}", operand.numel(), operand)  # the flow may lie in that of the product above
        if not move.tokens_last and dx is None:
            back = _product(weight.mT, flow.mT, out).mT
        elif not move.tokens_last:
            back = _product(flow, weight, out)
        elif dx is not None and not move.copies:  # in runs of fan_in, as x lies
            back = _product(flow.mT, weight, out).mT
        else:
            back = _product(weight.mT, flow, out)
        sizes = tuple(move.state[axis] for axis in move.axes)
        labels = back.view(_known(sizes, back.numel())).permute(inverse(move.axes))
        if dx is not None:
            return dx.view(move.state).copy_(labels)
        if not labels.is_contiguous():
            labels = _scratch("flow", labels.numel(), labels).view(labels.shape).copy_(labels)
        below = self.products[k - 1]
        return labels.view((*below.matrix[:-2], below.factor[-2], -1))

    # -------------------------------------------------------------------------------------------------------- the call

    def _weights(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The factors as the products read them."""
        weights = []
        for move, factor in zip(self.products, factors, strict=True):
            weight = factor.reshape(move.factor)
            weights.append(weight.expand(move.repeats, -1, -1) if move.repeats > 1 else weight)
        return weights

    def _chunks(self, x: Tensor) -> list[tuple[int, int]]:
        """The chunks of the rows of x: one where there is no cache to stay in."""
        if x.device.type != "cpu":
            return [(0, x.shape[0])]
        numbers = (self.kept + self.out_features) * x.element_size()
        most_bytes, most_tokens, least_tokens = self.limits
        most = max(least_tokens, min(most_tokens, most_bytes // numbers))
        return chunks(x.shape[0], most, self.lines)


class _Total:
    """The sum over chunks of products of matrices: a gradient of a factor.  16-bit products are summed in 32 bit."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        if self.total is None:
            product = left @ right
            self.total = product if product.element_size() > 2 else product.float()
        elif self.total.dtype != left.dtype:
            self.total += left @ right
        elif left.ndim == 3:
            self.total.baddbmm_(left, right)
        else:
            self.total.addmm_(left, right)

    def gradient(self, move: Move, factor: Tensor) -> Tensor:
        """The sum in the shape of the factor."""
        total = self.total if self.total is not None else factor.new_zeros(move.factor)
        total = total.mT if self.total is not None and not move.tokens_last else total
        total = total.sum(0) if move.repeats > 1 else total
        return total.to(factor.dtype).reshape(factor.shape).contiguous()


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right``, of two or three axes, written to the memory of ``out``."""
    multiply = torch.bmm if left.ndim == 3 else torch.mm
    return multiply(left, right, out=out.view((*left.shape[:-1], right.shape[-1])))


def _ordered(y: Tensor, output: Move) -> Tensor:
    """Rows of the output with an axis for every label."""
    sizes = tuple(output.state[axis] for axis in output.axes)
    return y.reshape(sizes)


def _known(sizes: Shape, numel: int) -> Shape:
    """Sizes with the unknown one filled in, as views of strided tensors want it."""
    known = -math.prod(sizes)
    return tuple(numel // known if size == -1 else size for size in sizes)


_local = threading.local()


def _scratch(name: str, size: int, like: Tensor) -> Tensor:
    """Uninitialised memory that is free again at the next call with this name; on a CPU the same every time.

    Fresh memory costs a page fault for every 4 KiB, which was up to two fifths of the time of a product.
    """
    if like.device.type != "cpu":
        return like.new_empty(size)
    buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get((name, like.dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside
            buffer = buffers[name, like.dtype] = torch.empty(size, dtype=like.dtype)
    return buffer[:size]
