"""Flash attention on TPUs: JAX's Pallas kernel, divided over the devices of a mesh."""

import functools

from einops import rearrange
import jax
from jax.sharding import PartitionSpec

from gigatok_jax import sharding

BLOCK, LONGEST = 128, 512  # lengths are multiples of the first; blocks are at most the second
RESIDUALS = "attention"  # name of what the backward pass reads, for `layers.remat`


def applies(q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel takes queries and keys `[B, T, heads, head_dim]` of these shapes."""
    mesh = sharding.mesh_in_use()
    if sharding.platform() != "tpu" or mesh is None:
        return False
    batch, _, heads, head_dim = q.shape
    divided = batch % sharding.batch_shards(mesh) == 0 and heads % mesh.shape["tensor"] == 0
    return divided and head_dim % 8 == 0 and all(x.shape[1] % BLOCK == 0 for x in (q, k))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """Attention over `[B, T, heads, head_dim]`, as `jax.nn.dot_product_attention`.

    XLA does not divide such kernels over devices, so each gets its part of batch and heads here.
    """
    spec = PartitionSpec(("data", "fsdp"), None, "tensor")
    attend = functools.partial(_attend, is_causal=is_causal)
    divided = jax.shard_map(
        attend,
        mesh=sharding.mesh_in_use(),
        in_specs=(spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    return divided(q, k, v)


def _attend(q, k, v, *, is_causal, interpret=False):
    # Imported here, because only programs for TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (queries, heads), keys = q.shape[1:3], k.shape[1]
    mask = splash.CausalMask if is_causal else splash.FullMask
    block_q, block_k = (
        max(n for n in range(BLOCK, LONGEST + 1, BLOCK) if length % n == 0)
        for length in (queries, keys)
    )
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask((queries, keys))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q * q.shape[-1] ** -0.5, k, v))
    return rearrange(jax.vmap(kernel)(q, k, v), "b h t d -> b t h d")
