"""Checks that several processes run together: ``checks.py FOLDER SIZE NAME...``, started by the tests.

Every process writes the results of its checks to ``FOLDER/SIZE-RANK.json`` and ends at the first that fails.
"""

from __future__ import annotations

import copy
import datetime
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import killed_run
import torch
import torch.distributed as dist
from models import Net, adam, batch, loss_of, net, seed, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from structops.torch import Muon, StructuredLinear, init_, param_groups, plan, split
from structops.torch.distributed import (
    ColwiseStructured,
    ParallelStructuredLinear,
    RowwiseStructured,
    clip_grad_norm_,
    resume,
    save,
    shard_placement,
    split_by_mesh,
    tensor_parallel_plan,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
COLWISE, ROWWISE = ("*.q", "*.k", "*.v", "*.up"), ("*.o", "*.down")


def close(a, b, **kwargs):
    torch.testing.assert_close(whole(a), whole(b), **(kwargs or CLOSE))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_parameters(model, reference, **kwargs):
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert [name.removeprefix("module.") for name in ours] == list(theirs)
    for (name, parameter), other in zip(ours.items(), theirs.values(), strict=True):
        try:
            close(parameter.detach(), other.detach(), **kwargs)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def same_gradients(model, reference):
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        try:
            close(parameter.grad, other.grad)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


def mine():
    """The sequences of this process, where batches are divided."""
    share = 4 // dist.get_world_size()
    return slice(share * dist.get_rank(), share * (dist.get_rank() + 1))


def mean(losses):
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


def sharded(model, mesh=None, **kwargs):
    """The model under FSDP2, block by block."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    place = shard_placement(model, mesh.size())
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place, **kwargs)
    return fully_shard(model, mesh=mesh, shard_placement_fn=place, **kwargs)


def parallel(model, mesh=None):
    """The model with tensor-parallel attention and multilayer perceptrons."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    styles = tensor_parallel_plan(model, colwise=COLWISE, rowwise=ROWWISE, parts=mesh.size())
    return parallelize_module(model, mesh, styles)


# ----------------------------------------------------------------------------------------------------------- DDP, FSDP2


def check_ddp(folder):
    reference = net()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(reference))
    loss_of(model, batch(0)[mine()]).backward()
    loss_of(reference, batch(0)).backward()
    same_gradients(model, reference)
    clip = torch.nn.utils.clip_grad_norm_
    close(mean(train(model, [adam(model)], part=mine(), clip=clip)), train(reference, [adam(reference)], clip=clip))
    same_parameters(model, reference)


def check_fsdp(folder):
    for structure in ("btt(rank=2)", "low_rank(rank=4)", "kron"):
        reference = net(structure)
        model = sharded(copy.deepcopy(reference))
        clip = torch.nn.utils.clip_grad_norm_
        losses = mean(train(model, [adam(model)], part=mine(), clip=clip))
        close(losses, train(reference, [adam(reference)], clip=clip))
        same_parameters(model, reference)


def check_fsdp_holds_its_share(folder):
    """With the placement every process has half of a factor; FSDP2 alone leaves one of one block to the first."""
    for structure, axes in (("btt(rank=2)", (0, 0)), ("low_rank(rank=4)", (1, 1)), ("kron", (1, 1))):
        up = sharded(net(structure)).blocks[0].up
        assert [factor.placements[0].dim for factor in up.factors] == list(axes), structure
        assert all(2 * factor.to_local().numel() == factor.numel() for factor in up.factors), structure
    plain = fully_shard(StructuredLinear(16, 16, "kron"), mesh=init_device_mesh("cpu", (2,)))
    assert [f.to_local().numel() > 0 for f in plain.factors] == [dist.get_rank() == 0] * 2


def check_fsdp_from_meta(folder):
    """Built on the meta device, sharded, filled by the plan: the numbers of one process."""
    for structure in ("btt(rank=2)", "low_rank(rank=4)"):
        with torch.device("meta"):
            model = Net(structure).double()
        model = sharded(model).to_empty(device="cpu")
        for block in model.modules():
            if isinstance(block, nn.LayerNorm):
                block.reset_parameters()
        reference = net(structure)
        for each in (model, reference):
            for name, parameter in each.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
            init_(each, plan(each), seed(7))
        same_parameters(model, reference, rtol=0, atol=0)


def check_fsdp_mixed_precision(folder):
    reference = net().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(copy.deepcopy(reference), mp_policy=policy)
    assert model(batch(0)).dtype == torch.bfloat16
    losses = mean(train(model, [adam(model)], part=mine()).float())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    expected = train(reference, [adam(reference)])
    close(losses[0], expected[0], rtol=0.01, atol=0)
    close(losses, expected, rtol=0.1, atol=0)  # Adam divides small gradients by their size, so their noise counts


def check_fsdp_muon(folder):
    for structure in ("btt(rank=2)", "low_rank(rank=4)"):  # sharded on blocks, and on fan-out
        reference = net(structure)
        model = sharded(copy.deepcopy(reference))
        losses = mean(train(model, muon(model), part=mine()))
        close(losses, train(reference, muon(reference)), rtol=1e-3, atol=1e-3)
        same_parameters(model, reference, rtol=1e-3, atol=1e-3)


def check_muon_communicates_little(folder):
    """Nothing if sharded on blocks, else one gather for every factor that is sharded."""
    expected = {("btt(rank=2)", sharded): 0, ("low_rank(rank=4)", sharded): 24, ("btt(rank=2)", parallel): 12}
    for (structure, wrap), gathers in expected.items():
        model = wrap(net(structure))
        optimizer, _ = muon(model)
        loss_of(model, batch(0)).backward()
        with CommDebugMode() as mode:
            optimizer.step()
        assert mode.get_total_counts() == gathers, (structure, wrap, mode.get_comm_counts())


def muon(model):
    matrices, rest = split(model, plan(model, "muon"), lr=1e-2)
    return Muon(matrices), torch.optim.AdamW(rest)


# ------------------------------------------------------------------------------------------------------ tensor parallel

CUT = {
    ("dense", 16, 32): "both",
    ("low_rank(rank=3)", 16, 32): "both",
    ("kron", 16, 32): "both",
    ("tt(rank=2)", 16, 32): "both",
    ("tt(rank=2, num_cores=3)", 64, 64): "both",
    ("btt(rank=2)", 16, 32): "both",
    ("btt(blocks=4, rank=3)", 32, 16): "both",
    ("btt(num_cores=3)", 64, 64): "colwise",
    ("monarch(blocks=4)", 16, 32): "both",
    ("block_diag(blocks=4)", 16, 32): "both",
    ("blast(rank=3, blocks=2)", 16, 32): "both",
}


def check_tensor_parallel_layers(folder):
    """Every structure: result, gradients of x and of all parameters, with all options of a layer."""
    mesh = init_device_mesh("cpu", (2,))
    for (structure, n, m), which in CUT.items():
        for style in (ColwiseStructured, RowwiseStructured):
            if style is RowwiseStructured and which == "colwise":
                continue
            for options in ({}, {"bias": False, "recompute": True}, {"weight_norm": True}, {"weight_norm": "cap"}):
                try:
                    one_layer(mesh, structure, n, m, style, options)
                except Exception as error:
                    raise AssertionError(f"{structure}, {style.__name__}, {options}: {error}") from error


def one_layer(mesh, structure, n, m, style, options):
    reference = StructuredLinear(n, m, structure, dtype=torch.float64, generator=seed(0), **options)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.5)  # so that weight normalisation has something to do
        if reference.bias is not None:
            reference.bias.normal_(generator=seed(3))
    layer = parallelize_module(copy.deepcopy(reference), mesh, style())
    assert type(layer) is ParallelStructuredLinear
    assert all(isinstance(parameter, DTensor) for parameter in layer.parameters())
    assert any(p.to_local().numel() < p.numel() for p in layer.factors)
    x = torch.randn(5, 3, n, dtype=torch.float64, generator=seed(1)).requires_grad_()
    weight = torch.randn(5, 3, m, dtype=torch.float64, generator=seed(2))
    rank = mesh.get_local_rank()
    rows = n // 2 * rank, n // 2 * (rank + 1)
    columns = m // 2 * rank, m // 2 * (rank + 1)
    y = reference(x)
    (y * weight).sum().backward()
    mine = x.detach().clone().requires_grad_()
    if style is ColwiseStructured:
        result = layer(mine)
        close(result, y[..., slice(*columns)])
        (result * weight[..., slice(*columns)]).sum().backward()
        close(mine.grad, x.grad)
    else:
        piece = mine.detach()[..., slice(*rows)].requires_grad_()
        result = layer(piece)
        close(result, y)
        (result * weight).sum().backward()
        close(piece.grad, x.grad[..., slice(*rows)])
    same_gradients(layer, reference)
    assert all(p.grad.placements == p.placements for p in layer.parameters())
    close(layer.operator().to_dense(), reference.operator().to_dense())
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == ((m, n), torch.float64, x.device)


def check_tensor_parallel_layouts(folder):
    """Sequences sharded on tokens go in and come out; DTensors know their layout."""
    mesh = init_device_mesh("cpu", (2,))
    reference = nn.Sequential(
        *(StructuredLinear(16, 16, "btt(rank=2)", dtype=torch.float64, generator=seed(k)) for k in range(2))
    )
    with torch.no_grad():
        for layer in reference:
            layer.bias.normal_(generator=seed(5))
    model = copy.deepcopy(reference)
    styles = {
        "0": ColwiseStructured(input_layouts=Shard(1), use_local_output=False),
        "1": RowwiseStructured(output_layouts=Shard(1)),
    }
    parallelize_module(model, mesh, styles)
    x = torch.randn(3, 4, 16, dtype=torch.float64, generator=seed(1)).requires_grad_()
    y = reference(x)
    (y**2).sum().backward()
    tokens = slice(2 * mesh.get_local_rank(), 2 * mesh.get_local_rank() + 2)
    piece = x.detach()[:, tokens].clone().requires_grad_()
    result = model(piece)
    close(result, y[:, tokens])
    (result**2).sum().backward()
    close(piece.grad, x.grad[:, tokens])
    same_gradients(model, reference)
    given = distribute_tensor(x.detach(), mesh, [Shard(1)])
    close(model(given), y[:, tokens])


def check_tensor_parallel_scatters(folder):
    """Row-parallel in the place of column-parallel: whole x in, slices of y out."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for structure in ("btt(rank=2)", "low_rank(rank=3)", "block_diag(blocks=4)"):
        reference = StructuredLinear(16, 32, structure, dtype=torch.float64, generator=seed(0))
        with torch.no_grad():
            reference.bias.normal_(generator=seed(3))
        style = RowwiseStructured(input_layouts=Replicate(), output_layouts=Shard(-1))
        layer = parallelize_module(copy.deepcopy(reference), mesh, style)
        x = torch.randn(5, 16, dtype=torch.float64, generator=seed(1)).requires_grad_()
        mine = x.detach().clone().requires_grad_()
        y, result = reference(x), layer(mine)
        columns = slice(16 * rank, 16 * rank + 16)
        close(result, y[:, columns])
        (y**2).sum().backward()
        (result**2).sum().backward()
        close(mine.grad, x.grad)
        same_gradients(layer, reference)
        assert layer.bias.to_local().numel() == 16
        if structure == "btt(rank=2)":
            assert all(2 * factor.to_local().numel() == factor.numel() for factor in layer.factors)


def check_tensor_parallel(folder):
    for structure in ("btt(rank=2)", "monarch(blocks=4)", "low_rank(rank=4)", "block_diag(blocks=4)"):
        reference = net(structure)
        model = parallel(copy.deepcopy(reference))
        assert [row.lr_scale for row in plan(model)] == [row.lr_scale for row in plan(reference)]
        loss_of(model, batch(0)).backward()
        loss_of(reference, batch(0)).backward()
        same_gradients(model, reference)
        groups = split_by_mesh(param_groups(model, lr=3e-3, weight_decay=0.1))
        losses = train(model, [adam(model, groups, foreach=True)], clip=clip_grad_norm_)
        close(losses, train(reference, [adam(reference)], clip=torch.nn.utils.clip_grad_norm_))
        same_parameters(model, reference)


def check_tensor_parallel_init_and_muon(folder):
    model, reference = parallel(net()), net()
    for each in (model, reference):
        init_(each, plan(each), seed(7))
    same_parameters(model, reference, rtol=0, atol=0)
    close(train(model, muon(model)), train(reference, muon(reference)), rtol=1e-3, atol=1e-3)
    same_parameters(model, reference, rtol=1e-3, atol=1e-3)


def check_tensor_parallel_compiles(folder):
    torch._dynamo.reset()
    reference = nn.Sequential(
        StructuredLinear(16, 64, "btt(rank=2)"), nn.GELU(), StructuredLinear(64, 16, "btt(rank=2)")
    )
    styles = {"0": ColwiseStructured(), "2": RowwiseStructured()}
    model = parallelize_module(copy.deepcopy(reference), init_device_mesh("cpu", (2,)), styles)
    dist.broadcast(x := torch.randn(5, 16), 0)
    compiled = torch.compile(model, backend="eager")
    close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def check_checkpoint(folder):
    """What two processes write under FSDP2, they go on from under tensor parallelism, in the same curve."""
    model = sharded(net())
    optimizer = adam(model)
    train(model, [optimizer], part=mine())
    save(folder / "fsdp", 4, model, optimizer, extra={"position": 16})
    torch.manual_seed(dist.get_rank())
    losses = mean(train(model, [optimizer], part=mine(), start=4))
    if dist.get_rank() == 0:
        torch.save(losses, folder / "losses.pt")
    other = parallel(net())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    optimizer = adam(other, split_by_mesh(param_groups(other, lr=1.0, weight_decay=0.3, named=True)))
    found = resume(folder / "fsdp", other, optimizer)
    assert (found.step, found.extra) == (4, {"position": 16})
    close(train(other, [optimizer], start=4), losses)
    save(folder / "tensor_parallel", 8, other, optimizer)
    same_parameters(other, model)


def check_random_state(folder):
    torch.manual_seed(dist.get_rank())
    save(folder / "random", 0, net())
    first = torch.randn(3)
    assert resume(folder / "random", net()).step == 0
    assert torch.equal(torch.randn(3), first)
    assert resume(folder / "nothing", net()) is None


def check_whole_run(folder):
    """What a run that is killed has to end with."""
    killed_run.run(folder / "whole", folder / "whole.pt")


# ------------------------------------------------------------------------------------------------------ four processes


def check_two_axes(folder):
    """Two replicas' worth of data under FSDP2, each over two tensor-parallel processes; then from a checkpoint."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    reference = net()
    model = sharded(parallel(copy.deepcopy(reference), mesh["tp"]), mesh["dp"])
    rank = mesh["dp"].get_local_rank()
    part = slice(2 * rank, 2 * rank + 2)
    for factor in model.blocks[0].down.factors:
        assert 4 * factor.to_local().numel() == factor.numel()
    optimizer = adam(model, split_by_mesh(param_groups(model, lr=3e-3, weight_decay=0.1)), foreach=True)
    losses = mean(train(model, [optimizer], part=part, clip=clip_grad_norm_))
    close(losses, train(reference, [adam(reference)], clip=torch.nn.utils.clip_grad_norm_))
    same_parameters(model, reference)
    if (folder / "fsdp").exists():
        resume(folder / "fsdp", model, optimizer)
        losses = mean(train(model, [optimizer], part=part, start=4))
        close(losses, torch.load(folder / "losses.pt", weights_only=True))
    reference = net()
    model = sharded(parallel(net(), mesh["tp"]), mesh["dp"])
    for each in (model, reference):
        init_(each, plan(each), seed(3))
    same_parameters(model, reference, rtol=0, atol=0)
    close(mean(train(model, muon(model), part=part)), mean(train(reference, muon(reference))), rtol=1e-3, atol=1e-3)


def run(folder, rank, size, names):
    """The checks, in one of the processes."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    results = {}
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=100))
    for name in names:
        try:
            globals()[f"check_{name}"](folder)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{size}-{rank}.json").write_text(json.dumps(results), encoding="utf-8")
        if results[name]:
            os._exit(1)  # the others wait in a collective
    dist.barrier()
    dist.destroy_process_group()


def main(folder, size, names):
    """Fork after the imports, which take longer than the checks."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(folder, rank, size, names)) for rank in range(size)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        if any(process.exitcode for process in processes):
            time.sleep(3)  # the others may be about to say why
            break
    for process in processes:
        process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
