# %% [markdown]
# # Ring attention, with pictures
#
# A sequence of $n$ tokens is cut into $C$ *shards*, one for each device. Every query has to meet every key, but no
# device can hold all of them. So the queries stay, and the keys and values travel: at each *hop* every device works on
# the *block* it holds, then passes it to its neighbour. After $C$ hops every query has met every key, and no device
# ever held more than $n/C$ tokens and one block in flight.
#
# Three questions are answered here, each with the library's own code:
# 1. How can a softmax be computed from blocks that come one after the other?
# 2. Who holds which block at which hop?
# 3. With a causal mask half of all pairs vanish. Who has less to do then, and how does a *layout* even it out?

# %%
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)  # before the first computation

import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

import ringjax  # noqa: E402
from ringjax import partial  # noqa: E402
from ringjax.layout import as_layout  # noqa: E402
from ringjax.schedule import plan  # noqa: E402

C = 4
BLOCKS = ["#4477aa", "#ee9944", "#449966", "#aa4466"]  # one colour for each block, everywhere below
plt.rcParams.update({"figure.dpi": 80, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## 1. A softmax, block by block
#
# One query, eight keys in four blocks, and for simplicity a value of one number for each key. For the keys seen so far
# the query carries three numbers:
#
# $$\text{max} = \max_j s_j, \qquad \text{sum} = \sum_j e^{s_j - \text{max}}, \qquad
#   \text{acc} = \sum_j e^{s_j - \text{max}}\, v_j .$$
#
# A new block may bring a larger maximum. Then what was gathered before is scaled by $e^{\text{old} - \text{new}}$,
# which is at most 1, so nothing overflows. At any time $\text{acc} / \text{sum}$ is the exact attention over the keys
# seen so far, and at the end it is the exact attention over all of them.

# %%
logits = np.array([1.0, 0.5, 2.0, -1.0, 4.0, 3.5, 0.3, 1.5], np.float32)
values = np.array([1.0, 3.0, 2.0, 0.0, 5.0, 4.0, 1.0, 2.0], np.float32)


def of_block(s, v):
    """The partial result of one block, with the axes [batch, head, query] that the library uses."""
    weights = np.exp(s - s.max())
    numbers = (weights @ v).reshape(1, 1, 1, 1), s.max().reshape(1, 1, 1), weights.sum().reshape(1, 1, 1)
    return partial.Partial(*(jnp.asarray(x) for x in numbers))


carry = partial.identity((1, 1, 1), 1, jnp.dtype("float32"))
history = []
for block in range(C):
    part = slice(2 * block, 2 * block + 2)
    carry = partial.merge(carry, of_block(logits[part], values[part]))
    out, _ = partial.finish(carry)
    history.append([float(x.squeeze()) for x in (carry.max, carry.sum, carry.acc, out)])
history = np.array(history)

softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
np.testing.assert_allclose(history[-1, -1], softmax @ values, rtol=1e-6)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", width_ratios=[1, 1.7])
left.bar(range(8), logits, color=[BLOCKS[j // 2] for j in range(8)])
left.axhline(0, color="black", linewidth=0.8)
left.set(title="logits of eight keys, four blocks", xlabel="key", ylabel="logit", xticks=range(8))

right.axis("off")
table = right.table(
    [[f"{x:.3f}" for x in row] for row in history],
    rowLabels=[f"after block {b}" for b in range(C)],
    colLabels=["max", "sum", "acc", "acc / sum"],
    rowColours=[f"{color}66" for color in BLOCKS],
    bbox=[0.2, 0.25, 0.8, 0.75],
)
right.set_title("what the query carries", x=0.6)
right.text(
    0.0, 0.02, f"softmax over all keys at once: {softmax @ values:.3f}. Block 2 raises the maximum from 2 to 4:\n"
    f"what came before is scaled by exp(2 - 4) = {np.exp(-2):.3f}.", va="bottom"
)  # fmt: skip
plt.show()

# %% [markdown]
# The order of the blocks does not matter, so each device may start with its own. That is what makes a ring possible.
#
# ## 2. The hops
#
# Device $i$ sends to device $i - 1$. At hop $t$ it therefore holds block $(i + t) \bmod C$. There are $C$ blocks and
# only $C - 1$ rotations: after the last hop nobody needs the block any more. While a device works on one block the next
# one is already on its way.

# %%
schedule = plan(C, as_layout("contiguous"), 8, 8, left=None, right=None)
hops = np.array([schedule.holds(rank) for rank in range(C)])

figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
for rank in range(C):
    for hop, block in enumerate(hops[rank]):
        axes.add_patch(Rectangle((hop, rank - 0.35), 0.62, 0.7, facecolor=BLOCKS[block]))
        axes.text(hop + 0.31, rank, f"K/V {block}", ha="center", va="center", color="white", weight="bold")
        if hop + 1 < C:  # to the neighbour, which works on it next
            style = {"arrowstyle": "->", "color": BLOCKS[block], "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
            if rank > 0:
                axes.annotate("", (hop + 1, rank - 1), (hop + 0.62, rank), arrowprops=style)
            else:  # around the end of the ring
                axes.annotate("", (hop + 0.8, -0.62), (hop + 0.62, rank), arrowprops=style)
                axes.annotate("", (hop + 1, C - 1), (hop + 0.82, C - 0.38), arrowprops=style)
axes.set(xlim=(-0.1, C - 0.25), ylim=(C - 0.35, -0.65), yticks=range(C), xticks=np.arange(C) + 0.31)
axes.set_yticklabels([f"device {rank}" for rank in range(C)])
axes.set_xticklabels([f"hop {hop}" for hop in range(C)])
axes.tick_params(length=0)
axes.spines[["left", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 3. Masks and layouts
#
# Below, one row for each query and one column for each key, both in *ring order*: the shards of device 0, 1, 2, 3 laid
# end to end. A dot of colour is a pair that attends under the causal mask; the colour is the block that the key
# travels in. The lines separate the devices.
#
# - **contiguous**: device 0 has the first quarter of the text, which attends little; device 3 has the last, which
#   attends everything. Empty squares are skipped, but at hop 1 device 3 alone has work, and the others wait for it.
# - **zigzag**: each device has an early and a late chunk, so every square off the diagonal is half full.
# - **striped**: the tokens are dealt like cards, so every square is a triangle.

# %%
LENGTH = 32
SHARD = LENGTH // C
LAYOUTS = ("contiguous", "zigzag", "striped")


def attends(layout, left=None):
    """[queries, keys] in ring order: causal, and at most `left` tokens back."""
    p = np.asarray(ringjax.ring_positions(LENGTH, layout=layout, num_shards=C))
    distance = p[None, :] - p[:, None]
    return (distance <= 0) & (True if left is None else distance >= -left)


def draw_mask(axes, mask):
    """The pairs that attend, coloured by block, with a line between two shards."""
    block = np.arange(LENGTH) // SHARD
    axes.imshow(np.where(mask, block + 1, 0), cmap=ListedColormap(["#f4f4f4", *BLOCKS]), vmin=0, vmax=C)
    for edge in range(SHARD, LENGTH, SHARD):
        axes.axhline(edge - 0.5, color="black", linewidth=1)
        axes.axvline(edge - 0.5, color="black", linewidth=1)
    middle = np.arange(C) * SHARD + SHARD / 2 - 0.5
    axes.set_xticks(middle, [f"block {b}" for b in range(C)])
    axes.set_yticks(middle, [f"dev {d}" for d in range(C)])
    axes.tick_params(length=0)


figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
for axes, layout in zip(panels, LAYOUTS, strict=True):
    draw_mask(axes, attends(layout))
    axes.set_title(layout)
plt.show()

# %% [markdown]
# The same pictures, counted: the pairs each device works on at each hop. All devices meet at the end of a hop, so a hop
# lasts as long as its longest bar; the titles give the sum of the longest bars. Zigzag comes out even, striped almost:
# a fair share would be a quarter of all pairs on each device.


# %%
def work(mask, blocks):
    """[hop, device]: how many pairs."""
    squares = mask.reshape(C, SHARD, C, SHARD).sum((1, 3))
    return np.array([[squares[rank, blocks[rank][hop]] for rank in range(C)] for hop in range(len(blocks[0]))])


figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained", sharey=True)
for axes, layout in zip(panels, LAYOUTS, strict=True):
    pairs = work(attends(layout), hops)
    for rank in range(C):
        axes.bar(np.arange(C) + 0.2 * (rank - 1.5), pairs[:, rank], width=0.17, color=[BLOCKS[b] for b in hops[rank]])
    axes.set_title(f"{layout}: {pairs.max(1).sum()} in turn, fair {pairs.sum() // C}", fontsize=10)
    axes.set_xticks(range(C), [f"hop {hop}" for hop in range(C)])
panels[0].set_ylabel("pairs of devices 0, 1, 2, 3")
plt.show()

# %% [markdown]
# ## 4. A window makes hops unnecessary
#
# With a sliding window a query attends the `left` tokens before it and itself. In the contiguous layout the keys it
# needs lie on its own device and on the ones just before, so most hops are never made: not computed, and not sent.

# %%
figure, panels = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for axes, left in zip(panels, (6, 14), strict=True):
    needed = plan(C, as_layout("contiguous"), SHARD, SHARD, left=left, right=0)
    draw_mask(axes, attends("contiguous", left))
    axes.set_title(f"left = {left}, shard of {SHARD}: {len(needed.hops)} hops, {needed.num_rotations} sent")
    mask, blocks = attends("contiguous", left), [needed.holds(rank) for rank in range(C)]
    assert work(mask, blocks).sum() == mask.sum()  # the hops that are made cover every pair
plt.show()

# %% [markdown]
# ## 5. The real thing
#
# Four simulated devices, causal, zigzag. `to_ring_order` brings the sequence into ring order once; in a training job
# that happens to the tokens, in the data pipeline, and everything between the embedding and the loss stays there.

# %%
mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:C]), ("sp",))
key = jax.random.key(0)
q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (1, 256, heads, 16)) for i, heads in enumerate((4, 2, 2)))
ring_q, ring_k, ring_v = ringjax.to_ring_order((q, k, v), layout="zigzag", num_shards=C)
ring_out = ringjax.ring_attention(ring_q, ring_k, ring_v, mesh=mesh, is_causal=True, layout="zigzag")
out = ringjax.from_ring_order(ring_out, layout="zigzag", num_shards=C)

dense = jax.nn.dot_product_attention(q, k, v, is_causal=True)
np.testing.assert_allclose(out, dense, atol=2e-6)

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.semilogy(np.abs(np.asarray(out - dense)).max((0, 2, 3)), ".", markersize=3, label="|ring - dense|, largest")
axes.semilogy(np.abs(np.asarray(dense)).max((0, 2, 3)), ".", markersize=3, label="|dense|, largest")
axes.axhline(float(np.finfo(np.float32).eps), color="black", linewidth=0.8, label="float32 epsilon")
axes.set(xlabel="position in the text", title="the ring's output, back in natural order", ylim=(1e-9, 20))
axes.legend(loc="center", frameon=False, bbox_to_anchor=(0.5, 0.55))
plt.show()
