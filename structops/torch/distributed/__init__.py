"""Structured layers on more than one machine; imported on its own, since what it needs of torch is slow to import."""

from structops.shards import ChainShard as ChainShard
from structops.shards import shard_chain as shard_chain
from structops.torch.distributed.checkpoint import Resumed as Resumed
from structops.torch.distributed.checkpoint import resume as resume
from structops.torch.distributed.checkpoint import save as save
from structops.torch.distributed.gradients import clip_grad_norm_ as clip_grad_norm_
from structops.torch.distributed.gradients import split_by_mesh as split_by_mesh
from structops.torch.distributed.parallel import ColwiseStructured as ColwiseStructured
from structops.torch.distributed.parallel import ParallelStructuredLinear as ParallelStructuredLinear
from structops.torch.distributed.parallel import RowwiseStructured as RowwiseStructured
from structops.torch.distributed.parallel import shard_layer as shard_layer
from structops.torch.distributed.parallel import tensor_parallel_plan as tensor_parallel_plan
from structops.torch.distributed.sharding import shard_placement as shard_placement
