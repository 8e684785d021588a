# %% [markdown]
# # Ring attention, with pictures
#
# A sequence of $n$ tokens is cut into $C$ *shards*, one for each device. Every query has to meet every key, but no
# device can hold all of them. So the queries stay, and the keys and values travel: at each *hop* every device works on
# the *block* it holds, then passes it to its neighbour. After $C$ hops every query has met every key, and no device
# ever held more than $n/C$ tokens and one block in flight.
#
# Seven questions are answered here, each with the library's own code:
# 1. How can a softmax be computed from blocks that come one after the other?
# 2. Who holds which block at which hop?
# 3. With a causal mask half of all pairs vanish. Who has less to do then, and how does a *layout* even it out?
# 4. Which hops does a sliding window spare?
# 5. What travels in the backward pass?
# 6. How do transfers hide behind the work?
# 7. How much memory does a device need?

# %%
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)  # before the first computation

import math  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

import ringjax  # noqa: E402
from ringjax import partial  # noqa: E402
from ringjax.inspect.memory import floor_terms  # noqa: E402
from ringjax.inspect.program import Program  # noqa: E402
from ringjax.layout import as_layout  # noqa: E402
from ringjax.schedule import permutation, plan  # noqa: E402

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

# %% tags=["hide-input"]
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
hops = np.array([schedule.holds(rank) for rank in range(C)])  # [device, hop]
assert hops[0].tolist() == [0, 1, 2, 3] and hops[3].tolist() == [3, 0, 1, 2]


# %% tags=["hide-input"]
def draw_ring(axes, columns):
    """A row for each device and a column for each name."""
    axes.set(xlim=(-0.1, len(columns) - 0.25), ylim=(C - 0.35, -0.65), yticks=range(C))
    axes.set_xticks(np.arange(len(columns)) + 0.31, columns)
    axes.set_yticklabels([f"device {rank}" for rank in range(C)])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_rotation(axes, hop, rank, colour, height=0.0):
    """An arrow from a device at one hop to its neighbour at the next; round the end of the ring in two pieces."""
    style = {"arrowstyle": "->", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    if rank > 0:
        axes.annotate("", (hop + 1, rank - 1 + height), (hop + 0.62, rank + height), arrowprops=style)
    else:
        axes.annotate("", (hop + 0.8, -0.62), (hop + 0.62, rank + height), arrowprops=style)
        axes.annotate("", (hop + 1, C - 1 + height), (hop + 0.82, C - 0.38), arrowprops=style)


figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
for rank in range(C):
    for hop, block in enumerate(hops[rank]):
        axes.add_patch(Rectangle((hop, rank - 0.35), 0.62, 0.7, facecolor=BLOCKS[block]))
        axes.text(hop + 0.31, rank, f"K/V {block}", ha="center", va="center", color="white", weight="bold")
        if hop + 1 < C:
            draw_rotation(axes, hop, rank, BLOCKS[block])
draw_ring(axes, [f"hop {hop}" for hop in range(C)])
axes.set_title("forward: the block that each device works on, and where it goes next")
plt.show()

# %% [markdown]
# ## 3. Masks and layouts
#
# A *layout* says which tokens each device holds. The text runs from left to right:

# %%
LENGTH = 32
SHARD = LENGTH // C
LAYOUTS = ("contiguous", "zigzag", "striped")

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(10, 2.3), layout="constrained")
for row, layout in enumerate(LAYOUTS):
    shards = np.asarray(ringjax.ring_positions(LENGTH, layout=layout, num_shards=C)).reshape(C, SHARD)
    for device, tokens in enumerate(shards):
        for token in tokens:
            axes.add_patch(Rectangle((token, row - 0.4), 0.92, 0.8, facecolor=BLOCKS[device]))
            axes.text(token + 0.46, row, str(device), ha="center", va="center", color="white", fontsize=8)
axes.set(xlim=(0, LENGTH), ylim=(len(LAYOUTS) - 0.5, -0.5), xlabel="position in the text")
axes.set_title(f"the device that holds each of {LENGTH} tokens")
axes.set_xticks(np.arange(0, LENGTH, 4) + 0.46, [str(token) for token in range(0, LENGTH, 4)])
axes.set_yticks(range(len(LAYOUTS)), LAYOUTS)
axes.tick_params(length=0)
axes.spines[["left", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# Below, one row for each query and one column for each key, both in *ring order*: the shards of device 0, 1, 2, 3 laid
# end to end. A dot of colour is a pair that attends under the causal mask; the colour is the block that the key
# travels in. The lines separate the devices.
#
# - **contiguous**: device 0 has the first quarter of the text, which attends to little; device 3 has the last, which
#   attends to everything. Empty squares are skipped, but at hop 1 device 3 alone has work, and the others wait for it.
# - **zigzag**: each device has an early and a late chunk, so every square off the diagonal is half full.
# - **striped**: the tokens are dealt like cards, so every square is a triangle.


# %% tags=["hide-input"]
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
    axes.set_xlabel("keys")
    axes.tick_params(length=0)


figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
for axes, layout in zip(panels, LAYOUTS, strict=True):
    draw_mask(axes, attends(layout))
    axes.set_title(layout)
panels[0].set_ylabel("queries")
figure.suptitle("pairs that attend under the causal mask, in ring order")
plt.show()

# %% [markdown]
# The same pictures, counted: the pairs each device works on at each hop. All devices meet at the end of a hop, so a hop
# lasts as long as its longest bar; the titles give the sum of the longest bars. Zigzag comes out even, striped almost:
# a fair share would be a quarter of all pairs on each device.


# %% tags=["hide-input"]
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
figure.suptitle("work of each device at each hop; the colour is the block")
plt.show()

# %% [markdown]
# ## 4. A window makes hops unnecessary
#
# With a sliding window a query attends to the `left` tokens before it and to itself. In the contiguous layout the keys
# that it needs lie on its own device and on the ones just before, so most hops are never made: not computed, and not
# sent. Of a block that does travel, only the keys that some query needs are sent.

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for axes, left in zip(panels, (6, 14), strict=True):
    needed = plan(C, as_layout("contiguous"), SHARD, SHARD, left=left, right=0)
    draw_mask(axes, attends("contiguous", left))
    axes.set_title(f"left = {left}, shard of {SHARD}: {len(needed.hops)} hops, {needed.num_rotations} sent")
    mask, blocks = attends("contiguous", left), [needed.holds(rank) for rank in range(C)]
    assert work(mask, blocks).sum() == mask.sum()  # the hops that are made cover every pair
panels[0].set_ylabel("queries")
plt.show()

# %% [markdown]
# ## 5. Backward
#
# The gradient of a query, $dq$, is a sum over all keys, so it stays with its device like the softmax in forward. The
# gradients of a key and a value, $dk$ and $dv$, are sums over all queries, and these are on all devices. So the keys
# and values go round a second time, and **the sums of $dk$ and $dv$ travel with the block that they belong to**. Each
# device adds what its own queries contribute. Logits are computed again from q, k and the log-sum-exp that forward
# kept; nothing of size $n \times n$ is stored.
#
# A block may leave before the kernel runs, but its sums cannot: they contain what the kernel adds. They follow one hop
# later, behind the next kernel. So K/V make $C - 1$ rotations again, and the sums make $C$: the last one brings them
# home.

# %%
added = {}  # (hop, device): who has added to the sums that the device holds after that hop's kernel
for index, hop in enumerate(schedule.hops):
    source = {to: sender for sender, to in permutation(hop.shift, C)}
    for rank in range(C):
        arrived = added[index - 1, source[rank]] if index else frozenset()
        added[index, rank] = arrived | {rank}
home = {to: sender for sender, to in permutation(schedule.hops[-1].homeward, C)}
for rank in range(C):
    assert hops[home[rank]][-1] == rank  # these are the sums of the own block,
    added[C, rank] = added[C - 1, home[rank]]
    assert added[C, rank] == set(range(C))  # to which all devices have added

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(11, 4.6), layout="constrained")
for (hop, rank), who in added.items():
    block = rank if hop == C else hops[rank][hop]
    if hop < C:
        axes.add_patch(Rectangle((hop, rank - 0.38), 0.62, 0.34, facecolor=BLOCKS[block]))
        axes.text(hop + 0.31, rank - 0.21, f"K/V {block}", ha="center", va="center", color="white", weight="bold")
        draw_rotation(axes, hop, rank, BLOCKS[block], height=0.2)
    axes.add_patch(Rectangle((hop, rank + 0.02), 0.62, 0.36, facecolor="white", edgecolor=BLOCKS[block], linewidth=1.5))
    axes.text(hop + 0.03, rank + 0.2, f"dK/dV {block}", va="center", fontsize=9)
    for device in range(C):
        colour = BLOCKS[block] if device in who else "#eeeeee"
        axes.add_patch(Rectangle((hop + 0.31 + 0.075 * device, rank + 0.08), 0.065, 0.24, facecolor=colour))
        label = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if device in who else "#999999"}
        axes.text(hop + 0.3425 + 0.075 * device, rank + 0.2, str(device), **label)
draw_ring(axes, [*(f"hop {hop}" for hop in range(C)), "home"])
axes.set_title("backward: K/V as before; arrows: the sums of dK and dV; small squares: the devices that have added")
plt.show()

# %% [markdown]
# ## 6. Overlap
#
# A rotation takes time on the wire. It is issued *before* the kernel that works on the present block, and awaited after
# it, so wire and kernel work at the same time. Whether that is so can be read off the traced program: here is the
# order of its permutes and kernels, for one device, in the pass forward and the pass backward.

# %% tags=["hide-input"]
mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:C]), ("sp",))


def inner_jaxprs(equation):
    for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def names(equation):
    """The primitives of an equation and of all inside it."""
    yield equation.primitive.name
    for inner in inner_jaxprs(equation):
        for each in inner.eqns:
            yield from names(each)


def events(jaxpr):
    """In the program's order ("send", bytes), ("kernel", 0), ("barrier", 0); what multiplies matrices is a kernel."""
    for equation in jaxpr.eqns:
        found = set(names(equation))
        if equation.primitive.name == "ppermute":
            yield "send", sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in equation.outvars)
        elif "ppermute" in found:
            for inner in inner_jaxprs(equation):
                yield from events(inner)
        elif "dot_general" in found:
            yield "kernel", 0
        elif equation.primitive.name == "optimization_barrier" and equation.invars[0].aval.shape:
            yield "barrier", 0  # those that begin with a number are a kernel's own


def steps(jaxpr):
    """(bytes that are issued, whether a kernel follows) between one barrier and the next."""
    found = [[0, False]]
    for name, size in events(jaxpr):
        if name == "barrier":
            found.append([0, False])
        assert not (name == "send" and found[-1][1])  # never behind the kernel
        found[-1][0] += size
        found[-1][1] |= name == "kernel"
    return [(size, kernel) for size, kernel in found if size or kernel]


# %%
def attend(q, k, v):
    config = ringjax.RingConfig(unroll=C)  # no loop, so that every hop stands in the program
    return ringjax.ring_attention(q, k, v, mesh=mesh, is_causal=True, layout="zigzag", config=config)


def gradients(q, k, v):
    return jax.vjp(attend, q, k, v)[1](q)


shapes = [jax.ShapeDtypeStruct((1, 64, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
forward = steps(jax.make_jaxpr(attend)(*shapes).jaxpr)
both = steps(jax.make_jaxpr(gradients)(*shapes).jaxpr)
backward = both[len(forward) :]
block = 2 * 16 * 2 * 16 * 2  # K and V, 16 tokens, 2 heads of 16, 2 bytes
assert forward == [(block, True), (block, True), (block, True), (0, True)]
# The sums are in float32 and have twice the bytes of K/V. They come home as they are returned, in bfloat16.
assert [size / block for size, _ in backward] == [1, 3, 3, 2, 1]
assert [kernel for _, kernel in backward] == [True, True, True, True, False]

# %% [markdown]
# In forward $C - 1$ rotations stand before a kernel each, and the last kernel has none to wait for. In backward the
# first step sends K/V, the next two K/V and the sums of the step before, the last one these sums alone. Only their trip
# home has no kernel left to hide behind.
#
# Drawn to scale, with this order and with assumed rates: the kernel of a hop takes 1 forward and 2.5 backward (two
# matrix products and five), and K/V of a block are 0.6 on the wire. With shards of a third of the length a kernel has a
# ninth of the pairs to work on, but the wire a third of the bytes. That is the longer one then, and every hop waits.


# %% tags=["hide-input"]
def draw_time(axes, found, kernel, wire, title):
    """Kernels above, the wire below. A step ends when both are done."""
    time, waited = 0.0, 0.0
    for number, (size, runs) in enumerate(found):
        busy, sent = kernel * runs, wire * size / block
        if busy:
            axes.add_patch(Rectangle((time, 1.06), busy, 0.8, facecolor="#4477aa", edgecolor="white"))
            axes.text(time + busy / 2, 1.46, f"kernel {number}", ha="center", va="center", color="white", fontsize=9)
        keys_and_values = wire if runs and size in (block, 3 * block) else 0
        start = time
        for length, colour in ((keys_and_values, "#ee9944"), (sent - keys_and_values, "#aa4466")):
            if length:
                axes.add_patch(Rectangle((start, 0.14), length, 0.8, facecolor=colour, edgecolor="white"))
                start += length
        if sent > busy:
            axes.add_patch(
                Rectangle((time + busy, 1.06), sent - busy, 0.8, fill=False, hatch="////", edgecolor="#888888")
            )
            waited += sent - busy
        time += max(busy, sent)
    axes.set(xlim=(0, time * 1.01), ylim=(0, 2), yticks=[0.54, 1.46], xlabel="time (kernel of a forward hop = 1)")
    axes.set_yticklabels(["wire", "device"])
    axes.set_title(f"{title}: {waited / time:.0%} of the time is waiting", fontsize=11)
    axes.tick_params(axis="y", length=0)


figure, panels = plt.subplots(3, 1, figsize=(10, 6), layout="constrained")
draw_time(panels[0], forward, 1, 0.6, "forward")
draw_time(panels[1], backward, 2.5, 0.6, "backward")
draw_time(panels[2], forward, 1 / 9, 0.6 / 3, "forward, shards of a third of the length")
labels = {"kernel": "#4477aa", "K/V on the wire": "#ee9944", "sums of dK/dV on the wire": "#aa4466"}
marks = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in labels.values()]
waits = Rectangle((0, 0), 1, 1, fill=False, hatch="////", edgecolor="#888888")
figure.legend([*marks, waits], [*labels, "waiting for the wire"], loc="outside lower center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# A program is one thing and what the compiler makes of it another. `ringjax inspect` compiles a ring for TPUs or GPUs,
# without having them, and counts the transfers that really stand around a kernel.
#
# ## 7. Memory per device
#
# What a device must hold at the worst moment is a short list, and each entry of it is a shard of something: all fall as
# $1/C$. `ringjax inspect` holds the peak of compiled programs against this list; here it is by itself, for
# 131,072 tokens, 32 query heads and 8 K/V heads of 128 in bfloat16, one layer, forward and backward. Beside it:
#
# - **all-gather**, where each device fetches the keys and values of all, and sums their gradients for all: these
#   do not fall with $C$;
# - **dense attention** that forms the logits, in float32, with the queries sharded over the devices: every device has
#   $n/C$ rows of $n$ logits. Fused kernels avoid that on one device too, which is the point at $C = 1$.
#
# On two devices the ring needs more than all-gather: it carries float32 sums from hop to hop, where all-gather has one
# kernel that sees all keys. From a few devices on that is outweighed, and the more the more devices there are.

# %%
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 131_072, 32, 8, 128


def terms(devices, strategy):
    """Name and bytes of what a device holds at the moment that needs most."""
    program = Program(
        topology="v5p:4x4x4", ring=devices, seq_len=TOKENS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        value_head_dim=HEAD_DIM, is_causal=True, backward=True, strategy=strategy,
    )  # fmt: skip
    return {term.name: term.bytes for term in floor_terms(program)}


devices = 2 ** np.arange(7)
ring = np.array([sum(terms(int(count), "ring").values()) for count in devices])
gathered = np.array([sum(terms(int(count), "all_gather").values()) for count in devices])
logits_bytes = 4.0 * HEADS * TOKENS * TOKENS / devices
assert (ring[2:-1] == 2 * ring[3:]).all()  # with two devices there are fewer blocks under way

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=[1, 1.15])
for name, needed, colour in (
    ("dense: logits alone", logits_bytes, "#999999"), ("all-gather", gathered, "#aa4466"), ("ring", ring, "#4477aa")
):  # fmt: skip
    left.loglog(devices, needed / 2**30, "o-", color=colour, label=name, base=2)
left.set_yscale("log", base=10)
left.set_xticks(devices, [str(count) for count in devices])
left.set(xlabel="devices", ylabel="GiB per device", title="memory of one layer's attention")
left.legend(frameon=False)

rows = [(strategy, count) for strategy in ("all_gather", "ring") for count in (32, 8)]
kinds = {
    "query, key, value, output, dout": "#4477aa",
    "blocks received, or all keys and values": "#ee9944",
    "sums of dK and dV": "#aa4466",
    "sum of dq, log-sum-exp, delta": "#449966",
}


def kind(name):
    if "dkey" in name:
        return 2
    if "dquery" in name or "lse" in name:
        return 3
    return 1 if "receive" in name or "gathered" in name else 0


for row, (strategy, count) in enumerate(rows):
    sizes = np.zeros(len(kinds))
    for name, size in terms(count, strategy).items():
        sizes[kind(name)] += size / 2**30
    right.barh(row, sizes, left=np.cumsum(sizes) - sizes, color=list(kinds.values()), height=0.7)
right.set_yticks(range(len(rows)), [f"{strategy}, {count} devices" for strategy, count in rows])
right.set(xlabel="GiB per device", title="what it is made of")
handles = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in kinds.values()]
figure.legend(handles, list(kinds), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## 8. The real thing
#
# Four simulated devices, causal, zigzag. `to_ring_order` brings the sequence into ring order once; in a training job
# that happens to the tokens, in the data pipeline, and everything between the embedding and the loss stays there.

# %%
key = jax.random.key(0)
q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (1, 256, heads, 16)) for i, heads in enumerate((4, 2, 2)))


def with_gradients(function):
    """The output, and the gradients of query, key and value for a cotangent like the query."""
    return jax.jit(lambda q, k, v: (lambda out, pull: (out, *pull(q)))(*jax.vjp(function, q, k, v)))


def ring_attend(q, k, v):
    return ringjax.ring_attention(q, k, v, mesh=mesh, is_causal=True, layout="zigzag")


def dense_attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


in_order = ringjax.to_ring_order((q, k, v), layout="zigzag", num_shards=C)
got = ringjax.from_ring_order(with_gradients(ring_attend)(*in_order), layout="zigzag", num_shards=C)
want = with_gradients(dense_attend)(q, k, v)
for ours, dense in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, dense, atol=2e-5)

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained", sharey=True)
for axes, name, ours, dense in zip(panels, ("output", "dq", "dk", "dv"), got, want, strict=True):
    for numbers, label in ((dense, "|dense|"), (ours - dense, "|ring - dense|")):
        axes.semilogy(np.abs(np.asarray(numbers)).max((0, 2, 3)), ".", markersize=3, label=label)
    axes.axhline(float(np.finfo(np.float32).eps), color="black", linewidth=0.8, label="float32 epsilon")
    axes.set(xlabel="position in the text", title=name)
panels[0].set_ylabel("largest entry of a token")
figure.suptitle("the ring beside dense attention, back in natural order")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()
