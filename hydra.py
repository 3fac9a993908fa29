# SPDX-License-Identifier: MIT
r"""Hydra: sequentially dependent draft heads for Medusa decoding (arXiv 2402.05109), in one file.

A language model reads all of its weights to write one token, and reading them for one token or
for a few dozen takes about the same time. So Hydra guesses a small *tree* of continuations with
cheap draft heads, verifies the whole tree in one forward pass of the base model, and keeps the
longest path that the base model agrees with. Every decode step does the same:

    root   = the token that the base model has chosen but not yet read
    hidden = what the heads see of the token before root: the base model's final hidden state, or
             in Hydra++ what its prefix layer, one more decoder layer, makes of it
    repeat:
        1 draft    tokens of the tree below root: for each node of depth i, head i reads hidden
                   and the i+1 tokens on the path to it; its best guesses are the node's children
        2 verify   one forward of the base model over all N nodes; a node sees the committed
                   prefix, its ancestors and itself (the tree attention mask), nothing else
        3 accept   the longest path whose every token is what the base model wanted there (or
                   finds likely enough: section 5 has the rules); the base model's next token
                   after that path is a free extra, the bonus token
        4 commit   the accepted path's keys and values stay in the cache, the others' slots are
                   free; root = bonus token; hidden = the last accepted node's

Draft heads are counted from 0: the base model at position t predicts token t + 1, head i token
t + 2 + i. Medusa's head i sees hidden alone: it must guess without knowing which tokens stand in
between. That one difference is `head_input` below, and it is the paper's idea.

The running example is this tree of seven nodes. Node 0, the root, is always right; every other
node is named by its *choice*, the path of child ranks that leads to it:

                  0 "sat"                       node  choice     parent  depth  rank
                 /       \                       1    [0]           0      1     0
            1 "on"       2 "down"                2    [1]           0      1     1
            /    \            \                  3    [0, 0]        1      2     0
      3 "the"    4 "a"       5 "."               4    [0, 1]        1      2     1
         |                                       5    [1, 0]        2      2     0
      6 "mat"                                    6    [0, 0, 0]     3      3     0

Two ideas keep the file small.

*A step reads nothing back to the host, and its shapes depend on no token.* A tree always has N
nodes, and every row of a batch carries its own length as a tensor. Rows that accept different
numbers of tokens follow, and a step can be recorded as a CUDA graph, or compiled.

*No key ever moves.* The cache is slots, and beside each slot stands the position in the text of
the token in it, or -1 if it is free. A tree goes into the first N free slots; to commit a path is
to write its positions there (picture: `commit_path`). So rows of any length share one tensor, and
a sliding window is a comparison of two positions.

Shapes: B batch rows, N tree nodes, n nodes of a level, m of the next, K draft heads, D hidden size,
V vocabulary, T tokens, S cache slots (all, or those that are read), H key-value heads, Dh their
width. Sections are this file's; "of the paper" is added where they are not.

Contents. Part I, the method: 1 draft heads, 2 tree, 3 tree attention, 4 drafting, 5 acceptance,
6 KV cache, 7 decode loop. Part II, to use it: 8 training, 9 models, 10 command line.
"""
import copy
import inspect
import math
import time
import types
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
import transformers
from torch import nn


def require(condition, message):
    """Raise ValueError: every bad input ends here, with one line that says what to do."""
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------- 1 draft heads


@dataclass
class HydraConfig:
    """Which draft heads to build; KINDS says how Medusa, Hydra and Hydra++ differ."""

    num_heads: int = 4  # K, how deep below the root the tree can be
    num_layers: int = 1  # blocks in a head's MLP
    grounded: bool = True  # True is Hydra; False is Medusa, whose heads see no tokens
    prefix_layer: bool = False  # Hydra++: one more decoder layer over the hidden states
    dropout: float = 0.0  # in training; released heads have it with a prefix layer only

    def __post_init__(self):
        require(self.prefix_layer or not self.dropout, "dropout needs prefix_layer=True")


KINDS = {
    "medusa": dict(grounded=False),
    "hydra": dict(),  # grounded, as HydraConfig is by default
    "hydra++": dict(num_layers=4, prefix_layer=True),
}


def head_input(hidden, embeddings):
    """The paper's idea in one line: a head sees the hidden state *and* the tokens guessed so far.

    hidden (..., D): the base's state h[t], or Hydra++'s p[t].  embeddings (..., i+1, D): the
    base's input embeddings of tokens t+1 .. t+1+i, oldest first.  Returns (..., (i+2)*D), in
    that order.  Training and drafting both call it.  Section 3 of the paper.

    >>> head_input(torch.tensor([1., 2.]), torch.tensor([[3., 4.], [5., 6.]]))
    tensor([1., 2., 3., 4., 5., 6.])
    """
    return torch.cat([hidden, embeddings.flatten(-2)], dim=-1)


class DraftHeads(nn.Module):
    """K draft heads for one base model, and the prefix layer if there is one.

    config: HydraConfig.  model: any decoder-only causal language model of transformers; the heads
    take its widths, dtype and device, start from its lm_head, and keep no reference to it.
    Module names are those of the released checkpoints.  Section 3 of the paper; 4 for Hydra++.
    """

    def __init__(self, config, model):
        super().__init__()
        base_lm_head = model.get_output_embeddings()
        self.vocab, self.width = base_lm_head.weight.shape  # V, D
        self.config = config
        self.base_name = model.config.name_or_path
        self.choices = None  # of the tree found for these heads, once there is one

        # these names, prefix_embeding_layer too, are spelt as in the released files
        heads = range(config.num_heads)
        self.hydra_mlp = nn.ModuleList(make_mlp(config, i, self.width) for i in heads)
        self.hydra_lm_head = nn.ModuleList(make_lm_head(config, base_lm_head) for i in heads)
        self.prefix_embeding_layer = make_prefix_layer(model) if config.prefix_layer else None
        set_dtype(self, model.dtype)
        self.to(model.device).eval()

    def forward(self, i, hidden, embeddings):
        """Logits of head i: hidden (B, 1, D), embeddings (B, n, i+1, D) -> (B, n, V).

        One hidden serves all n paths (in training each has its own: hidden (B, n, D)).  Medusa's
        heads read no path, and give (B, 1, V): the same for all n.
        """
        if self.config.grounded:
            hidden = head_input(hidden.expand(*embeddings.shape[:-2], -1), embeddings)
        return self.hydra_lm_head[i](self.hydra_mlp[i](hidden))

    def read_prefix(self, hidden, **kwargs):
        """What the heads see in place of hidden (B, T, D): itself, or the prefix layer's output.

        kwargs: attention mask, positions and cache, as for the base model.
        """
        if self.prefix_embeding_layer is None:
            return hidden
        return self.prefix_embeding_layer(inputs_embeds=hidden, **kwargs).last_hidden_state


class ResBlock(nn.Module):
    """y = R(x) + SiLU(W x + b), W zero at first, as released; R narrows x, or is the identity."""

    def __init__(self, width_in, width):
        super().__init__()
        self.linear = nn.Linear(width_in, width)
        nn.init.zeros_(self.linear.weight)
        self.res_connection = nn.Identity() if width_in == width else nn.Linear(width_in, width)

    def forward(self, x):
        return self.res_connection(x) + F.silu(self.linear(x))


def make_mlp(config, i, width):
    """Head i's MLP: (i+2)*D numbers in (Medusa: D), D out."""
    input_width = (i + 2) * width if config.grounded else width
    first = ResBlock(input_width, width)

    # subtle: later blocks are one and the same module, used again and again, as the released heads
    # were trained. Hydra: first, later, later, ...; Medusa: first, first, first, ...
    later = ResBlock(width, width) if config.grounded else first
    return in_sequence(config, [first] + [later] * (config.num_layers - 1))


def make_lm_head(config, base_lm_head):
    """A head's own lm_head: a copy of the base's, with a bias of zero where that has none."""
    vocab, width = base_lm_head.weight.shape
    lm_head = nn.Linear(width, vocab)
    nn.init.zeros_(lm_head.bias)
    # the weight, and the bias if the base has one
    for own, base in zip(lm_head.parameters(), base_lm_head.parameters()):
        own.data.copy_(whole(base))
    return in_sequence(config, [lm_head]) if config.prefix_layer else lm_head


def in_sequence(config, modules):
    """The modules one after the other; heads with a prefix layer have a dropout before each.

    It must be there even at 0.0: released weights are named 1, 3, ... where others are 0, 1, ...
    """
    layers = []
    for module in modules:
        layers += [nn.Dropout(config.dropout), module] if config.prefix_layer else [module]
    return nn.Sequential(*layers)


def make_prefix_layer(model):
    """Hydra++'s prefix layer: a decoder of the base's own architecture with a single layer.

    It reads the base's final hidden states in place of embeddings: p[t] attends to h[0..t], and
    comes out of a norm of its own.  In the KV cache it is one more layer after the base's.  Its
    weights are random until trained or loaded.  Section 4 of the paper.
    """
    config = copy.deepcopy(model.config.get_text_config())
    layer_index = config.num_hidden_layers
    config.num_hidden_layers = 1
    config.use_cache = False  # not in training; decoding asks for the cache by name

    # it attends to the whole prefix, even where the base's layers have a sliding window
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    else:
        config.sliding_window = None

    layer = transformers.AutoModel.from_config(config)
    layer.set_input_embeddings(None)  # never used: it is fed hidden states
    for module in layer.modules():
        for name in ("layer_idx", "layer_id"):  # where its attention writes in the cache
            if hasattr(module, name):
                setattr(module, name, layer_index)
    return layer


def whole(weight):
    """A weight of the base, put together from its shards where several GPUs share it (DTensor)."""
    # only a sharded weight, a DTensor, has full_tensor
    return getattr(weight, "full_tensor", weight.detach)()


def set_dtype(module, dtype):
    """Change the dtype of the weights, but not of buffers: RoPE's frequencies stay in fp32."""
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)


# -------------------------------------------------------------------------------- 2 tree


@dataclass(eq=False)
class Tree:
    """A tree of N nodes, sorted by (depth, choice); node 0 is the root and its own parent."""

    choices: list  # the N - 1 choices, of nodes 1 .. N-1
    levels: list  # for each depth the slice of nodes that have it
    num_nodes: int  # N
    max_depth: int  # the depth of the last level
    num_guesses: int  # guesses to ask of each node: the largest rank + 1
    parents: torch.Tensor  # (N,) each node's parent
    depths: torch.Tensor  # (N,) its distance from the root
    ranks: torch.Tensor  # (N,) its rank among its parent's guesses, 0 the best
    paths: torch.Tensor  # (N, max_depth+1) the nodes from root to it, itself repeated
    mask: torch.Tensor  # (N, N) bool, the tree attention mask: section 3, below

    def to(self, device):
        """The same tree with its tensors on another device."""
        moved = copy.copy(self)
        for name in ("parents", "depths", "ranks", "paths", "mask"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


def build_tree(choices):
    """From a list of choices to a Tree.

    choices: lists of child ranks, in any order; `[0, 2]` is the third-best child of the best
    child of the root.  Ranks may have gaps and any node may be expanded, but a choice's parent
    must be a choice too.  Nodes are numbered by (depth, choice) from the root, 0; no choices give
    the one-node tree.  ValueError names a choice that is malformed, twice there, or has no parent.

    >>> tree = build_tree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    >>> tree.parents.tolist(), tree.depths.tolist(), tree.ranks.tolist()
    ([0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 0, 1, 0, 0])
    >>> tree.paths[4].tolist(), tree.paths[6].tolist()
    ([0, 1, 4, 4], [0, 1, 3, 6])
    >>> tree.levels[2]  # the nodes of depth 2
    slice(3, 6, None)
    """
    check_choices(choices)
    choices = sorted(map(tuple, choices), key=lambda choice: (len(choice), choice))
    path_of = {(): [0]}  # for each choice, in node order, the nodes from the root to it
    parents = [0]
    for node, choice in enumerate(choices, start=1):
        parent = choice[:-1]
        require(parent in path_of, f"choice {[*choice]} has no parent: add {[*parent]}")
        require(choice not in path_of, f"choice {[*choice]} is there twice")
        path_of[choice] = path_of[parent] + [node]
        parents.append(path_of[parent][-1])

    paths = list(path_of.values())
    depths = [len(path) - 1 for path in paths]
    ranks = [0] + [choice[-1] for choice in choices]

    # nodes are sorted by depth, so a level is a slice and the last node is one of the deepest
    max_depth = depths[-1]
    levels = [slice(depths.index(depth), depths.index(depth) + depths.count(depth))
              for depth in range(max_depth + 1)]
    padded = [path + path[-1:] * (max_depth + 1 - len(path)) for path in paths]
    parents = torch.tensor(parents)
    return Tree(
        choices=[list(choice) for choice in choices],
        levels=levels,
        num_nodes=len(paths),
        max_depth=max_depth,
        num_guesses=max(ranks) + 1,
        parents=parents,
        depths=torch.tensor(depths),
        ranks=torch.tensor(ranks),
        paths=torch.tensor(padded),
        mask=tree_attention_mask(parents),  # section 3, below
    )


def check_choices(choices):
    """Raise ValueError that names the first choice which is not a list of ranks."""
    for choice in choices:
        is_list = isinstance(choice, (list, tuple)) and len(choice) > 0
        require(is_list and all(type(rank) is int and rank >= 0 for rank in choice),
                f"choice {choice!r} must be a list of ranks 0, 1, 2, ...")


# The released tree, 64 nodes with the root. CHILDREN says how many children a choice has in it,
# from its best guess on; choices are written as digits: "" is the root, "01" is [0, 1]
CHILDREN = {
    "": 10,
    "0": 10, "1": 7, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1, "8": 1, "9": 1,
    "00": 10, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "20": 1,
    "000": 2,
}
MC_SIM_7B_63 = [[*map(int, digits), rank]
                for digits, count in CHILDREN.items() for rank in range(count)]


# ---------------------------------------------------------------------- 3 tree attention

# First who sees whom in the tree; then which slots of the KV cache that makes. A slot holds a
# committed token, or is free; the tree lies in free ones while it is verified (`commit_path` in
# section 6 has the picture).


def tree_attention_mask(parents):
    """Which node may attend to which: its ancestors and itself.

    parents (N,): each node's parent, parents before children, the root its own.  Returns (N, N)
    bool; row attends to column, so a node's row is also the path that leads to it.  Siblings and
    cousins never see each other: each path is computed as if it stood alone after the prefix,
    and one forward verifies all of them.

    >>> tree_attention_mask(torch.tensor([0, 0, 0, 1, 1, 2, 3])).int()
    tensor([[1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0],
            [1, 0, 1, 0, 0, 1, 0],
            [1, 1, 0, 1, 0, 0, 1]], dtype=torch.int32)
    """
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents.tolist()):
        mask[node] |= mask[parent]  # what my parent sees, and myself
    return mask


def visible_slots(slot_positions, slots, mask):
    """Which slots of the cache each of T tokens sees: all committed ones, its ancestors', its own.

    slot_positions (B, S): the position of the committed token in each slot, -1 where it is free.
    slots (B, T): the free slots that the T tokens will go to.  mask (T, T) bool: which of
    them see each other, the tree's ancestors, or causal in a prompt.  Returns (B, T, S) bool.

    >>> slot_positions = torch.tensor([[0, -1, 1, -1]])  # two tokens are committed
    >>> slots = torch.tensor([[1, 3]])  # a root and its child went into the gaps
    >>> visible_slots(slot_positions, slots, torch.tensor([[1, 0], [1, 1]]).bool()).int()
    tensor([[[1, 1, 1, 0],
             [1, 1, 1, 1]]], dtype=torch.int32)
    """
    # the committed prefix, the same for each token
    num_tokens = len(mask)
    prefix = (slot_positions >= 0)[:, None].expand(-1, num_tokens, -1)  # (B, T, S)

    # among themselves: column j of the mask goes to the slot of token j
    slot_of_column = slots[:, None].expand(-1, num_tokens, -1)  # (B, T, T)
    return prefix.scatter(2, slot_of_column, mask.expand_as(slot_of_column))


def within_window(visible, slot_positions, slots, positions, window):
    """What is left of visible (B, T, S) where a token sees only the last `window` positions.

    slot_positions, slots as in `visible_slots`.  positions (B, T): where the T tokens stand.  With
    a window of 4 a token at position 13 sees positions 10 to 13, its own among them.  (A free
    slot's -1 does not matter: nobody sees it.)
    """
    all_positions = slot_positions.scatter(1, slots, positions)  # the T tokens' as well
    distance = positions[:, :, None] - all_positions[:, None]  # (B, T, S)
    return visible & (distance < window)


def additive_mask(visible, dtype):
    """The mask as transformers takes it, (B, 1, T, S): 0, or dtype's most negative number."""
    mask = torch.zeros_like(visible, dtype=dtype)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


# ---------------------------------------------------------------------------- 4 drafting


def draft_tree(heads, tree, root, hidden, embed):
    """Fill the tree with guesses, level by level, one head call per level but the last.

    heads: DraftHeads, or None if the tree is its root alone.  root (B,): the token at node 0.
    hidden (B, D): what the heads see of the position that predicted root.  embed: the base's
    input embedding.  Returns tokens (B, N), in node order; nothing is read by the host.  For every
    depth d but the last, head d is called with the n paths to its nodes, the root's token first:
    heads(d, hidden (B, 1, D), embeddings (B, n, d+1, D)) -> (B, n, V), from Medusa (B, 1, V), the
    same for all n.  A child of rank r is the r-th best guess, 0 the best, of its *own parent's*
    logits.
    """
    tokens = root[:, None]  # (B, 1), and with each level more
    for depth, (level, below) in enumerate(pairwise(tree.levels)):  # two slices of nodes
        # head `depth` reads the path to each of this level's n nodes
        paths = tree.paths[level, : depth + 1]  # (n, depth+1)
        embeddings = embed(tokens[:, paths])  # (B, n, depth+1, D)
        logits = heads(depth, hidden[:, None], embeddings)  # (B, n, V), Medusa's (B, 1, V)
        guesses = logits.topk(tree.num_guesses).indices  # (B, n, num_guesses), best first
        guesses = guesses.expand(-1, len(paths), -1)  # Medusa: the same for all nodes

        # each of the m nodes below is its own parent's guess of its rank
        parent_row = tree.parents[below] - level.start  # (m,)
        children = guesses[:, parent_row, tree.ranks[below]]  # (B, m)
        tokens = torch.cat([tokens, children], dim=1)
    return tokens


# -------------------------------------------------------------------------- 5 acceptance

# A rule, accept_..., takes the tree's tokens, the base's logits and the tree, and returns the last
# accepted node and the token after it. It says which nodes pass; `longest_accepted_path` is common
# to all. It is part of the step: its shapes are fixed, and it reads nothing back to the host.
# Settings, such as a temperature, are bound to it beforehand (`choose_acceptance`).


def longest_accepted_path(passes, tree, score=None):
    """The deepest node that passes together with all of its ancestors.

    passes (B, N) bool: does the node's token agree with the base model?  The root's is ignored.
    score (B, N): each node's own contribution; among paths of equal depth the one with the
    largest sum wins, and without a score the first in node order.  Returns node (B,).

    >>> tree = build_tree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    >>> # node 2 fails, and 5 with it; 3 fails, and 6 with it; of 0, 1 and 4 the last is deepest
    >>> longest_accepted_path(torch.tensor([[1, 1, 0, 0, 1, 1, 1]]).bool(), tree)
    tensor([4])
    """
    is_root = tree.depths == 0
    alive = (passes | is_root)[:, tree.paths].all(-1)  # (B, N): the whole path passes
    alive_depths = torch.where(alive, tree.depths, -1)
    if score is None:
        return alive_depths.argmax(-1)  # the first of the deepest

    on_path = tree.mask & ~is_root  # (N, N): row n is the path to n, without the root
    path_score = torch.where(on_path, score[:, None], 0).sum(-1)  # (B, N, N) -> (B, N)
    longest = alive_depths == alive_depths.max(-1, keepdim=True).values
    return torch.where(longest, path_score, -torch.inf).argmax(-1)


def pick(values, node):
    """Of values (B, N, ...) those at each row's node (B,): (B, ...)."""
    return values[torch.arange(len(node), device=node.device), node]


def accept_greedy(tokens, logits, tree):
    """Accept what plain greedy decoding would have written: the argmax passes.

    tokens (B, N), logits (B, N, V): the base's logits at every node, of which only the argmax
    counts.  A node passes when its token is the argmax at its parent.  Returns node (B,), where the
    `longest_accepted_path` ends, and next_token (B,), the base's choice there, the bonus token.
    """
    wanted = logits.argmax(-1)  # (B, N): after each node
    passes = tokens == wanted[:, tree.parents]  # the root's entry is ignored
    node = longest_accepted_path(passes, tree)
    return node, pick(wanted, node)


def accept_sampling(tokens, logits, tree, temperature):
    """Exact sampling (not in the paper): draw the base's token at each node, follow the draws.

    Shapes as in `accept_greedy`.  One independent draw from softmax(logits / temperature), in
    fp32, at every node; a child passes when it is what its parent drew, and the last node's draw
    is the bonus token.  So whatever was drafted, each token is a draw: the output has exactly the
    distribution of plain sampling.  Siblings hold distinct tokens (top-k), so at most one child of
    a node passes: what passes is a single chain, and no draw is preferred to another.
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    # subtle: argmax of p / e with e ~ Exponential(1) is a draw from p, without asking the host
    noise = torch.empty_like(probs).exponential_()
    return accept_greedy(tokens, probs / noise, tree)  # no logits, but the argmax is the draw


def accept_typical(tokens, logits, tree, temperature, epsilon=0.09, delta=0.3):
    """Typical acceptance: a token passes when it is likely enough, so text may leave plain greedy.

        p(token | its path) > min(epsilon, delta * exp(-H)),    H = - sum of p log(p + 1e-5)

    Where the base is unsure (H large) even improbable tokens pass.  Shapes as in `accept_greedy`;
    p, and with it H, is the parent's: the softmax, in fp32, of its logits / temperature.  Among
    longest paths the likeliest wins: the score is log p.  The bonus token is the last node's
    argmax; nothing is drawn.  Section 2 of the paper, as in Medusa.
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)  # (B, N, V)
    entropy = -(probs * torch.log(probs + 1e-5)).sum(-1)
    threshold = (delta * torch.exp(-entropy)).clamp(max=epsilon)  # (B, N)

    # a node's probability and threshold are its parent's to say
    token_probs = probs[:, tree.parents].gather(2, tokens[:, :, None])[:, :, 0]  # (B, N)
    passes = token_probs > threshold[:, tree.parents]
    node = longest_accepted_path(passes, tree, score=token_probs.log())
    return node, pick(logits.argmax(-1), node)


# ---------------------------------------------------------------------------- 6 KV cache


class TreeCache(transformers.Cache):
    """Keys and values in S slots for each layer and row; transformers' layers write into it.

    They are given masks and positions, so `update` is all that they call.
    slot_positions (B, S) says what is in a slot: the position in the text of a committed token, or
    -1 if the slot is free.  slots (B, T): where the tokens of the present forward go, chosen by
    `choose_free_slots`.  Only the first slots_read are used: less to attend to in short texts.
    """

    def __init__(self, batch_size, num_slots, device):
        super().__init__(layers=[])
        self.num_slots = num_slots
        self.slots_read = num_slots
        self.slot_positions = torch.full((batch_size, num_slots), -1, device=device)
        self.slot_numbers = torch.arange(num_slots, device=device)  # (S,)
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.keys = {}  # layer: (B, H, S, Dh)
        self.values = {}

    def choose_free_slots(self, count):
        """Set `slots`, where `count` new tokens go: each row's first free slots, in order.

        `update` writes there, and `commit_path` keeps some of them, until the next forward.
        """
        taken = self.slot_positions[:, : self.slots_read] >= 0
        # by number, taken ones last (a finished row may need them); topk returns them sorted
        sort_key = taken * self.num_slots + self.slot_numbers[: self.slots_read]
        self.slots = sort_key.topk(count, largest=False).indices

    def update(self, key, value, layer, *_, **__):
        """Called by each layer: write key, value (B, H, T, Dh), return all that may be read."""
        return self.write(self.keys, layer, key), self.write(self.values, layer, value)

    def write(self, tensors, layer, new):
        """Write new (B, H, T, Dh) into its slots; return that layer's (B, H, slots_read, Dh)."""
        if layer not in tensors:
            # the first forward shows heads, width and dtype. Zeros: a masked NaN would spread
            batch_size, num_heads, _, width = new.shape
            tensors[layer] = new.new_zeros(batch_size, num_heads, self.num_slots, width)

        # the two indexed dimensions come first: (B, T, H, Dh) on both sides
        tensors[layer][self.rows, :, self.slots] = new.transpose(1, 2)
        return tensors[layer][:, :, : self.slots_read]


def commit_path(slot_positions, slots, positions, kept):
    """Keep the accepted tokens, in place: their positions are written beside their slots.

    slot_positions (B, S): TreeCache's.  slots (B, N): where the tree is.  positions (B, N): where
    its nodes stand in the text.  kept (B, N) bool: the accepted path.  No key moves; the other
    nodes' slots are free, -1 is written there, and the next tree fills them.  Returns nothing; no
    loop, nothing read by the host.

        slot                0    1    2    3    4    5    6    7    8    9   10   11
        token             The  cat  sat   on down  the    a    .  mat
        node                          0    1    2    3    4    5    6
        position before     0    1   -1   -1   -1   -1   -1   -1   -1   -1   -1   -1
        position after      0    1    2    3   -1   -1    4   -1   -1   -1   -1   -1
        next tree's node                        0    1         2    3    4    5    6

    The tree lies in slots 2 to 8; sat, on and a are accepted, and keep positions 2, 3 and 4.
    """
    slot_positions.scatter_(1, slots, torch.where(kept, positions, -1))


# ------------------------------------------------------------------------- 7 decode loop


CHUNK = 512  # tokens of a prompt that go through the base at once


class Decoder:
    """The state of one decoding batch, and the step that advances it.

    A row *runs* until the host sees its end; then it goes on with the others on the device, but
    commits nothing past max_context, and nobody looks at it any more.

    model: the base.  heads: DraftHeads, or None with a one-node tree.  max_context: how many
    tokens, prompt included, a row may grow to.  accept: a rule of section 5 that takes (tokens,
    logits, tree); None is `accept_greedy`.  cuda_graph: replay a recorded step (None: on CUDA).
    compile: pass the step through torch.compile.  Raises ValueError for what does not fit.
    """

    def __init__(self, model, heads, tree, batch_size, max_context, accept=None, *,
                 cuda_graph=None, compile=False):
        check_fit(model, heads, tree, max_context)
        config = model.config.get_text_config()
        device = model.device
        self.model = model
        self.heads = heads
        self.tree = tree.to(device)
        self.accept = accept or accept_greedy
        self.max_context = max_context
        self.embed = model.get_input_embeddings()
        self.window = getattr(config, "sliding_window", None)
        self.layer_types = getattr(config, "layer_types", None)

        # what a step changes, always in place: a CUDA graph replays on these very tensors (and
        # `warm_up` puts them back). Slots for a full text and one tree
        self.cache = TreeCache(batch_size, max_context + tree.num_nodes, device)
        # a row's text is its `length` committed tokens, then its root, the token chosen last
        self.length = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.root = torch.zeros_like(self.length)  # (B,)
        # what the heads see of the last committed token (B, D)
        self.hidden = torch.zeros(batch_size, self.embed.embedding_dim, dtype=model.dtype,
                                  device=device)

        # the same step, faster: see `step`
        self.length_bound = 0  # the host's upper bound on the `length` of running rows
        self.graphs = {}  # slots read: the recorded step, and the tensors it writes
        self.cuda_graph = device.type == "cuda" if cuda_graph is None else cuda_graph
        # called with self: a bound method here would be a cycle, and free memory late
        self.advance_function = compiled_advance(tree) if compile else Decoder.advance

    def advance(self, tree):
        """One decode step: the method of the paper.

        tree: self.tree, or the one-node tree after the prompt.  Returns new tokens
        (B, max_depth+1) and counts (B,), how many of a row's are valid.
        """
        # draft: guesses below the root, each from the tokens on its own path
        tokens = draft_tree(self.heads, tree, self.root, self.hidden, self.embed)  # (B, N)

        # verify: one forward over all nodes, each seeing the prefix and its ancestors; it gives
        # out.logits (B, N, V), node_hidden (B, N, D), and says in cache.slots where the tree lies
        positions = self.length[:, None] + tree.depths  # (B, N)
        out, node_hidden = self.forward(self.model, tokens, positions, tree.mask)

        # accept: the deepest node whose whole path is what the base model wants
        node, bonus = self.accept(tokens, out.logits, tree)  # (B,), (B,)
        num_accepted = tree.depths[node]  # (B,): drafts, the root not counted

        # commit: a node's row of the mask is the path to it. Past the context nothing is kept
        kept = tree.mask[node] & (positions < self.max_context)  # (B, N)
        commit_path(self.cache.slot_positions, self.cache.slots, positions, kept)
        # committed are root and accepted drafts, emitted are accepted drafts and bonus token: both
        # are num_accepted + 1
        self.length.add_(num_accepted + 1).clamp_(max=self.max_context)
        self.root.copy_(bonus)
        self.hidden.copy_(pick(node_hidden, node))

        # new in the text: the path without the root, then the bonus token, then what is left over.
        # For node 4 of the example:
        path_tokens = tokens.gather(1, tree.paths[node])  # sat on a a
        shifted = path_tokens.roll(-1, dims=1)  # on a a sat
        new_tokens = shifted.scatter(1, num_accepted[:, None], bonus[:, None])  # on a BONUS sat
        return new_tokens, num_accepted + 1  # the first 3 of them

    def forward(self, network, tokens, positions, mask):
        """One forward over tokens (B, T): their keys and values go into free slots, cache.slots.

        network: the base model, or its body alone where nobody needs logits.  positions (B, T):
        where the tokens stand in the text.  mask (T, T) bool: which of them see each other; all
        see the committed prefix.  Returns network's output, and what the heads see (B, T, D).
        """
        cache = self.cache
        cache.choose_free_slots(tokens.shape[1])
        slot_positions = cache.slot_positions[:, : cache.slots_read]
        visible = visible_slots(slot_positions, cache.slots, mask)  # (B, T, S)
        full = additive_mask(visible, self.model.dtype)

        # layers with a sliding window see less; bases with two types of layers take two masks
        masks = full
        if self.window:
            near = within_window(visible, slot_positions, cache.slots, positions, self.window)
            windowed = additive_mask(near, self.model.dtype)
            masks = windowed
            if self.layer_types:
                masks = {"full_attention": full, "sliding_attention": windowed}

        # a node may stand past the end of the context, where there are no positions: never kept
        position_ids = positions.clamp(max=self.max_context - 1)
        kwargs = dict(position_ids=position_ids, past_key_values=cache, use_cache=True)
        # -1 asks transformers for the last state alone, the one after the final norm; releases that
        # do not know it take it for True, and give all
        out = network(tokens, attention_mask=masks, output_hidden_states=-1, **kwargs)
        hidden = out.hidden_states[-1]
        if self.heads:  # what they see in its place; their prefix layer has no window
            hidden = self.heads.read_prefix(hidden, attention_mask=full, **kwargs)
        return out, hidden

    @torch.inference_mode()
    def prefill(self, input_ids, attention_mask=None):
        """Read the prompts, and take a first step; returns as `advance`, one token a row.

        input_ids, attention_mask (B, T): 0 pads, on either side.  Raises ValueError.
        """
        attention_mask = check_prompts(self, input_ids, attention_mask)
        prompt_length = attention_mask.sum(1)  # (B,)
        longest = int(prompt_length.max())
        self.length_bound = longest
        self.set_slots_read(longest)
        self.cache.slot_positions.fill_(-1)

        # padding moves to the end of its row, where causal attention never sees it; now a token's
        # column is its position
        order = attention_mask.argsort(dim=1, descending=True, stable=True)
        tokens = input_ids.gather(1, order)[:, :longest]

        # keys and values of all prompts, in chunks, so that masks stay small; no logits yet. The
        # last token of a row is left uncommitted: it is the root of the first step
        for columns in torch.arange(longest, device=tokens.device).split(CHUNK):
            positions = columns.expand(len(tokens), -1)  # (B, T)
            causal = columns[:, None] >= columns  # (T, T)
            # for its keys and values alone, the prefix layer's among them
            self.forward(self.model.base_model, tokens[:, columns], positions, causal)
            kept = positions < prompt_length[:, None] - 1
            commit_path(self.cache.slot_positions, self.cache.slots, positions, kept)

        # the hidden states above were not kept (rows end in different chunks), and heads have
        # nothing to read yet: the tree of that step is its root alone
        self.length.copy_(prompt_length - 1)
        self.root.copy_(pick(tokens, self.length))
        first = self.advance(build_tree([]).to(tokens.device))
        self.warm_up()
        return first

    # The same step, faster. Nothing below changes what is decoded. For each number of slots that
    # attention reads, the first step is run as it is and then recorded, later ones are replayed;
    # `warm_up` is such a first step, undone.

    def set_slots_read(self, length):
        """Read 512 slots, 1024, ... or all, as many as a row with so many committed tokens needs.

        Trees go into the first free slots, so a row of n tokens lies within its first n + N.  More
        slots than that do no harm: free ones are masked.  Fewer harm a finished row alone, whose
        trees then overwrite its own text.
        """
        needed = length + self.tree.num_nodes
        power_of_two = 1 << (needed - 1).bit_length()
        self.cache.slots_read = min(max(512, power_of_two), self.cache.num_slots)

    @torch.inference_mode()
    def step(self, max_committed=None):
        """`advance`, compiled where asked, on a GPU replayed from a recording; returns the same.

        max_committed: how many tokens a running row has committed at most, from a caller who has
        seen the counts; None: the decoder's own bound.  A replay overwrites the last result.
        """
        require(self.length_bound > 0, "prefill comes before the first step")
        committed = max_committed or self.length_bound
        self.set_slots_read(committed)
        self.length_bound = committed + self.tree.max_depth + 1  # when this step is done

        # there is a recording for each number of slots
        size = self.cache.slots_read
        if size in self.graphs:
            graph, result = self.graphs[size]
            graph.replay()
            return result

        # recording runs nothing, so the first step of a size is run by itself, then recorded
        result = self.advance_function(self, self.tree)
        if self.cuda_graph:
            self.graphs[size] = self.record()
        return result

    def record(self):
        """A CUDA graph of a step, and the tensors it writes."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = self.advance_function(self, self.tree)
        except RuntimeError as error:
            raise ValueError(f"no CUDA graph of this step, use --no-cuda-graph: {error}") from error
        return graph, result

    def warm_up(self):
        """A step on trial, to compile and record; what it changed on the device is put back.

        (Keys in free slots do not matter, and length_bound may be larger than need be.)
        """
        if self.advance_function is Decoder.advance and not self.cuda_graph:
            return
        state = (self.cache.slot_positions, self.length, self.root, self.hidden)
        before = [tensor.clone() for tensor in state]
        # the random numbers that it draws are put back as well
        with torch.random.fork_rng([self.model.device] if self.root.is_cuda else []):
            self.step()
        for tensor, saved in zip(state, before):
            tensor.copy_(saved)


def compiled_advance(tree):
    """`Decoder.advance`, compiled."""
    # a copy for each decoder, code and all: torch recompiles one code object a few times only
    advance = types.FunctionType(Decoder.advance.__code__.replace(), globals())
    # tuning pays for single tokens only
    options = {"coordinate_descent_tuning": tree.num_nodes == 1}
    return torch.compile(advance, fullgraph=True, dynamic=False, options=options)


class Row:
    """One row of a batch, as the host sees it: its new tokens, and whether it still runs."""

    def __init__(self, text_length, max_length, eos):
        self.text_length = text_length  # of prompt and new tokens together
        self.max_length = max_length
        self.eos = eos  # tokens that end it
        self.new_tokens = []
        self.emitted = []  # counts: for prefill 1, for each step accepted drafts + 1
        self.running = True

    def add(self, tokens):
        """Take the tokens of a step, as far as EOS or the greatest length."""
        self.emitted.append(len(tokens))
        for token in tokens:
            self.new_tokens.append(token)
            self.text_length += 1
            if token in self.eos or self.text_length == self.max_length:
                self.running = False
                return


@dataclass
class Output:
    """What `generate` returns."""

    sequences: torch.Tensor  # (B, T'): the prompt as given, from column T new tokens, padding
    new_tokens: list  # for each row its new tokens, without padding
    emitted: list  # counts, for each row and step: accepted drafts + 1, not cut at EOS
    seconds: float  # of all steps, prefill left out

    @property
    def tokens_per_step(self):
        """Accepted drafts + 1, averaged over all steps of all rows; 1.0 for plain decoding."""
        counts = sum(self.emitted, [])
        return sum(counts) / max(len(counts), 1)


def decode(decoder, input_ids, *, attention_mask=None, max_new_tokens=128, eos_token_id="model",
           pad_token_id=None, streamer=None):
    """Decode prompts with a Decoder, which can be used again; arguments as for `generate`."""
    require(max_new_tokens > 0, f"{max_new_tokens=} must be 1 or more")
    require(len(input_ids) == 1 or not streamer, "a streamer shows one row: pass a single prompt")
    step_tokens, counts = decoder.prefill(input_ids, attention_mask)
    lengths = decoder.length.tolist()  # the first step has committed all of each prompt
    eos = end_tokens(decoder.model, eos_token_id)
    rows = [Row(length, min(length + max_new_tokens, decoder.max_context), eos)
            for length in lengths]
    if streamer:
        streamer.put(input_ids.cpu())

    start = time.perf_counter()  # prefill is done, and whatever was compiled or recorded
    running = rows
    while running:
        # the host's one look at a step
        num_shown = len(rows[0].new_tokens)  # by the streamer
        for row, tokens, count in zip(rows, step_tokens.tolist(), counts.tolist()):
            if row.running:
                row.add(tokens[:count])

        # launch the next step before printing. A text is committed tokens, then the root: hence - 1
        running = [row for row in rows if row.running]
        if running:
            step_tokens, counts = decoder.step(max(row.text_length for row in running) - 1)
        if streamer:  # a GPU works meanwhile
            streamer.put(torch.tensor(rows[0].new_tokens[num_shown:]))
    seconds = time.perf_counter() - start
    if streamer:
        streamer.end()

    # as model.generate: rows that ended early are padded
    pads = [pad_token_id, decoder.model.generation_config.pad_token_id, *eos, 0]
    pad = next(token for token in pads if token is not None)
    new_tokens = [row.new_tokens for row in rows]
    width = max(map(len, new_tokens))
    padded = [tokens + [pad] * (width - len(tokens)) for tokens in new_tokens]
    sequences = torch.cat([input_ids, input_ids.new_tensor(padded)], dim=1)
    emitted = [row.emitted[1:] for row in rows]  # without the prefill's single token
    return Output(sequences, new_tokens, emitted, seconds)


def generate(model, heads, input_ids, *, tree=None, accept="greedy", temperature=1.0,
             epsilon=0.09, delta=0.3, max_new_tokens=128, eos_token_id="model",
             pad_token_id=None, attention_mask=None, streamer=None, max_context=None,
             cuda_graph=None, compile=False):
    """Decode with draft heads; greedy gives plain decoding's text, sampling its distribution.

    model: the base model
    heads: DraftHeads for it, or None
    input_ids (B, T): the prompts
    tree: a Tree, choices, or None for the heads' own, else MC_SIM_7B_63 as far as it fits
    accept: "greedy", "typical", "sampling", or a rule: (tokens, logits, tree) -> (node, next_token)
    temperature: of "typical" and "sampling"; 0 is greedy
    epsilon, delta: the thresholds of "typical"
    max_new_tokens: a row stops after so many, at EOS, or with max_context tokens
    eos_token_id: one, several, None, or "model" for those of the model's generation_config
    pad_token_id: what follows in rows that end early; None for the model's, else the first EOS
    attention_mask (B, T): 0 where input_ids are padding, on either side
    streamer: transformers' TextStreamer, say; gets a single prompt, then the tokens of each step
    max_context: tokens a row may have, prompt included; None for what is needed
    cuda_graph, compile: as for Decoder

    Returns an Output.  Raises ValueError for what cannot be done as asked.
    """
    tree = choose_tree(heads, tree)
    accept = choose_acceptance(accept, temperature, epsilon, delta)
    if max_context is None:
        max_context = min(input_ids.shape[-1] + max(max_new_tokens, 1), longest_context(model))
    decoder = Decoder(model, heads, tree, len(input_ids), max_context, accept,
                      cuda_graph=cuda_graph, compile=compile)
    return decode(decoder, input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens,
                  eos_token_id=eos_token_id, pad_token_id=pad_token_id, streamer=streamer)


def generate_plain(model, input_ids, **options):
    """Plain decoding: the same loop with the one-node tree. Options as for `generate`."""
    return generate(model, None, input_ids, tree=[], **options)


# What is chosen and checked before the first step; at a first reading it can be skipped.


def choose_tree(heads, tree):
    """A Tree from what a user may give: a Tree, choices, or None for the heads' own."""
    if isinstance(tree, Tree):
        return tree
    if tree is None:
        tree = heads.choices if heads else []
    if tree is None:  # these heads have none: the released one, as far as they reach
        tree = [choice for choice in MC_SIM_7B_63
                if len(choice) <= heads.config.num_heads and max(choice) < heads.vocab]
    return build_tree(tree)


def choose_acceptance(accept, temperature, epsilon, delta):
    """The acceptance rule of that name, its settings filled in; a rule of one's own as it is.

    At a temperature of 0, where they would divide by it, sampling and typical are greedy.
    """
    if callable(accept):
        return accept
    rules = {
        "greedy": accept_greedy,
        "sampling": partial(accept_sampling, temperature=temperature),
        "typical": partial(accept_typical, temperature=temperature, epsilon=epsilon, delta=delta),
    }
    require(accept in rules, f"accept must be one of {', '.join(rules)}, not {accept!r}")
    in_range = temperature == 0 or 1e-5 <= temperature < 1e5
    require(in_range and 0 < epsilon <= 1 and 0 < delta <= 1,
            f"{temperature=} must be 0 or in 1e-5 .. 1e5, {epsilon=} and {delta=} in (0, 1]")
    return rules[accept] if temperature else accept_greedy


def end_tokens(model, eos_token_id):
    """The ids that end a row, as a list."""
    if isinstance(eos_token_id, str):  # "model"
        eos_token_id = model.generation_config.eos_token_id
    return [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()


def longest_context(model):
    """How many positions the base has."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def check_prompts(decoder, input_ids, attention_mask):
    """The attention mask (B, T) of 0 and 1; ValueError where the batch or a row does not fit."""
    batch_size, context = len(decoder.root), decoder.max_context
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    fits = input_ids.shape == attention_mask.shape == (batch_size, input_ids.shape[-1])
    require(fits, f"prompts and attention_mask must have the same shape, ({batch_size}, T)")
    attention_mask = attention_mask.bool().long()
    lengths = attention_mask.sum(1).tolist()
    require(min(lengths, default=0) > 0, "the prompt is empty: give every row a token or more")
    require(max(lengths) < context,
            f"{max(lengths)} tokens fill a context of {context}: shorten the prompt")
    return attention_mask


def check_fit(model, heads, tree, max_context):
    """Raise ValueError if the base cannot read a tree, or heads, tree and context do not fit it."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    # get_setting(name) is what the base, or its RoPE, has under that name, or None
    get_setting = (vars(config) | rope).get
    missing = {"position_ids", "past_key_values"} - set(inspect.signature(model.forward).parameters)
    other_types = set(get_setting("layer_types") or ()) - {"full_attention", "sliding_attention"}

    # some bases are decoded rightly only while context and tree together are short enough
    limits = [
        get_setting("window_size"),  # GPT-Neo's local attention
        get_setting("keep_window_size"),  # Doge's dynamic mask
        # longrope has other frequencies from this length on
        get_setting("rope_type") == "longrope" and get_setting("original_max_position_embeddings"),
    ]
    limit = min(filter(None, limits), default=math.inf)  # most bases have none of them

    vocab, width = model.get_output_embeddings().weight.shape
    made_for = (heads.vocab, heads.width) if heads else (vocab, width)
    num_heads = heads.config.num_heads if heads else 0
    obstacles = [  # (what is wrong, unless it is false or empty; what to say)
        # of the base
        (model._is_stateful, "its layers carry a running state"),
        (missing, f"it does not take {missing}"),
        (get_setting("alibi"), "with alibi it tells positions by slots"),
        (get_setting("num_random_blocks"), "its attention is sparse at random"),  # BigBird
        (other_types, f"it has layers of type {other_types}"),
        (config._attn_implementation not in ("sdpa", "eager"), "load it with sdpa attention"),
        # of what is asked of it
        (max_context + tree.num_nodes > limit, f"context and tree exceed a window of {limit}"),
        (not 0 < max_context <= longest_context(model),
         f"{max_context=} must lie in 1 .. {longest_context(model)}"),
        (made_for != (vocab, width), f"its V, D are {(vocab, width)}, but the heads' {made_for}"),
        (tree.max_depth > num_heads, f"the tree is {tree.max_depth} deep, for {num_heads} heads"),
        (tree.num_guesses > vocab, f"{tree.num_guesses} guesses a node of only {vocab} tokens"),
    ]
    for obstacle, why in obstacles:
        require(not obstacle, f"cannot decode with {config.model_type}: {why}")


# =================================================== Part II: train it, load it, run it

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import ByteLevelBPETokenizer
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.utils import cached_file

# ---------------------------------------------------------------------------- 8 training

LOSSES = {  # what each kind of heads learns from: the text, or the base's own distribution
    "medusa": dict(lm_weight=1.0, teacher_weight=0.0),
    "hydra": dict(lm_weight=1.0, teacher_weight=0.0),
    "hydra++": dict(lm_weight=0.0, teacher_weight=1.0),
}


def read_base(model, heads, input_ids):
    """What training needs of input_ids (B, T): what the heads see, embeddings, base logits."""
    with torch.no_grad():
        out = model(input_ids, output_hidden_states=-1, use_cache=False)
        embeddings = model.get_input_embeddings()(input_ids)
    return heads.read_prefix(out.hidden_states[-1]), embeddings, out.logits


def true_paths(embeddings, i):
    """What head i reads in training: at position t the true tokens t+1 .. t+1+i, for drafts.

    embeddings (B, T, D) -> (B, T-2-i, i+1, D), for all t whose target t+2+i is in the text.
    """
    return embeddings[:, 1:-1].unfold(1, i + 1, 1).transpose(2, 3)


def head_losses(heads, hidden, embeddings, input_ids, base_logits, labels=None, *,
                lm_weight=1.0, teacher_weight=0.0):
    """Each head's loss on a text that the base model has read.

    Head i at position t reads the true tokens t+1 .. t+1+i in place of drafts, and is asked for
    token s = t + 2 + i.  lm loss: cross-entropy against token s; teacher loss: against the base's
    distribution for s, which stands at s - 1.  hidden: what the heads see, embeddings (B, T, D),
    input_ids, labels (B, T): -100 where a token does not count, base_logits (B, T, V).
    Returns (K,), each head's mean over what counts.  Sections 3 and 4 of the paper.
    """
    labels = input_ids if labels is None else labels

    def loss(i):
        logits = heads(i, hidden[:, : -2 - i], true_paths(embeddings, i))  # (B, T-2-i, V)
        logits = logits.flatten(0, 1).float()
        target = labels[:, i + 2 :].flatten()  # (B * (T-2-i),)
        total = lm_weight * F.cross_entropy(logits, target, reduction="none")
        if teacher_weight:
            teacher = base_logits[:, i + 1 : -1].flatten(0, 1).float().softmax(-1)
            total = total + teacher_weight * F.cross_entropy(logits, teacher, reduction="none")
        counted = target != -100
        return (total * counted).sum() / counted.sum().clamp(min=1)

    # checkpointed: only one head's logits live at a time, and backward computes them once more
    num_heads = heads.config.num_heads
    return torch.stack([checkpoint(loss, i, use_reentrant=False) for i in range(num_heads)])


def train_heads(model, heads, token_ids, *, labels=None, lm_weight=1.0, teacher_weight=0.0,
                **options):
    """Train draft heads on a text, token_ids (M,); the base model stays as it is.

    labels (M,): -100 where a token does not count; None: all do.  lm_weight, teacher_weight: as
    for `head_losses`, and LOSSES has the paper's.  options: as for `fit`, at least steps.
    Returns fit's history: K losses each time.  Sections 3 and 4 of the paper.
    """

    def losses(input_ids, labels):
        hidden, embeddings, logits = read_base(model, heads, input_ids)
        return head_losses(heads, hidden, embeddings, input_ids, logits, labels,
                           lm_weight=lm_weight, teacher_weight=teacher_weight)

    return fit(heads, losses, token_ids, labels=labels, **options)


def fit(module, losses, token_ids, *, labels=None, steps, batch_size=8, seq_len=64, lr=1e-3,
        final_lr=0.33, title=""):
    """Minimise the sum of losses(input_ids, labels) over random windows of a text.

    token_ids, labels (M,): the text; a batch is (batch_size, seq_len) of it.  AdamW on fp32
    weights, bf16 autocast (not for an fp32 module on a CPU), warm-up, then cosine from lr to
    final_lr * lr, gradients clipped at 1.  Returns the losses of every 25th step and the last.
    """
    num_tokens = len(token_ids)
    require(8 <= seq_len <= num_tokens, f"{seq_len=} must lie in 8 .. {num_tokens}, the text")
    text = torch.stack([token_ids, token_ids if labels is None else labels]).long()
    parameters = list(module.parameters())
    dtype, device = parameters[0].dtype, parameters[0].device
    in_bf16 = device.type == "cuda" or dtype != torch.float
    half = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16)
    set_dtype(module.train(), torch.float)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, fused=True)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, min(100, steps // 10), steps, min_lr_rate=final_lr)

    history = []
    windows = torch.Generator().manual_seed(0)
    bar = tqdm(range(steps), title, unit="token", unit_scale=batch_size * seq_len, disable=None)
    try:
        for step in bar:
            start = torch.randint(num_tokens - seq_len + 1, (batch_size, 1), generator=windows)
            batch = text[:, start + torch.arange(seq_len)].to(device)  # (2, batch_size, seq_len)
            with half:
                loss = losses(*batch)
            optimizer.zero_grad()
            loss.sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 25 == 0 or step == steps - 1:
                history.append(loss.tolist())
                bar.set_postfix(loss=f"{loss.sum():.3g}")
    finally:  # also on Ctrl-C
        set_dtype(module.eval(), dtype)
    return history


# which tree: counted ranks say how often a choice is accepted, measured time what it costs


@torch.no_grad()
def head_ranks(model, heads, input_ids):
    """Which rank each head gives the true token of a text (B, T), 0 the best: (B, T-1-K, K)."""
    hidden, embeddings, _ = read_base(model, heads, input_ids)
    num_heads = heads.config.num_heads
    ranks = []
    for i in range(num_heads):
        logits = heads(i, hidden[:, : -2 - i], true_paths(embeddings, i))  # (B, T-2-i, V)
        true_logits = logits.gather(-1, input_ids[:, i + 2 :, None])
        rank = (logits > true_logits).sum(-1)
        ranks.append(rank[:, : input_ids.shape[1] - 1 - num_heads])  # positions all heads have
    return torch.stack(ranks, dim=-1)


def search_tree(ranks, num_nodes):
    """The tree of num_nodes nodes that accepts most drafts, from counted ranks.

    ranks (M, K): of `head_ranks`.  A choice is accepted where the ranks start with it; returned
    are the num_nodes - 1 (or fewer) choices seen most often, in that order; ties: shorter, smaller.

    >>> search_tree(torch.tensor([[0, 0], [0, 1], [0, 0], [1, 0]]), 4)
    [[0], [0, 0], [1]]
    """
    seen = Counter()
    for row in ranks.tolist():
        seen.update(tuple(row[:depth]) for depth in range(1, len(row) + 1))
    best = sorted(seen, key=lambda choice: (-seen[choice], len(choice), choice))
    return [list(choice) for choice in best[: num_nodes - 1]]


def fastest_tree(model, heads, prompts):
    """The choices with which this device decodes prompts (n, T) fastest, greedily, one by one."""
    written = generate_plain(model, prompts, max_new_tokens=128, eos_token_id=None).sequences
    ranks = torch.cat([head_ranks(model, heads, part) for part in written.split(8)])
    ranks = ranks[:, prompts.shape[1] - 1 :].flatten(0, 1)  # where drafting would start
    times = []
    for size in (2, 4, 8, 12, 16, 24, 32, 48, 64):
        choices = search_tree(ranks, size)
        seconds = [generate(model, heads, prompt[None], tree=choices).seconds
                   for prompt in prompts[:8]]
        times.append((statistics.median(seconds), choices))
    return min(times)[1]


# ------------------------------------------------------------------------------ 9 models

VICUNA_PROMPT = """A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. \
USER: {{ messages[0].content }} ASSISTANT:"""


def load(name=None, heads=None, device=None, dtype=None):
    """A base model, its draft heads (or None) and its tokenizer.

    name: demo, vicuna-7b (-13b, -33b), a folder, or a Hub id; None: the base that heads name, else
    demo.  heads: a folder or Hub id; None: those that belong to name.  device, dtype: None is the
    GPU if there is one; fp32 on a CPU, else as saved.  ValueError says what is missing.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    require(device.type != "cuda" or torch.cuda.is_available(), "no CUDA here: use --device cpu")
    dtype = dtype or ("float32" if device.type == "cpu" else "auto")
    where = dict(device_map=device)
    if "RANK" in os.environ:  # one of torchrun's processes, which share the base
        shards = transformers.distributed.DistributedConfig(tp_plan="auto")
        where = dict(distributed_config=shards)

    if name is None:
        name = read_config(heads).get("base_model_name_or_path") if heads else "demo"
        require(name, f"{heads} names no base: give --model")
    if name == "demo":
        name = demo_folder()
        require(name.exists(), "the demo is not there yet: python hydra.py trains it, once")
        heads = heads or name / "hydra++"
    if name in ("vicuna-7b", "vicuna-13b", "vicuna-33b"):
        heads = heads or f"ankner/hydra-{name}-v1.3"
        name = f"lmsys/{name}-v1.3"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where)
    except Exception as error:  # files can be broken in many ways
        raise ValueError(f"cannot load the base model {name}: {error}") from error
    if "vicuna" in str(name).lower() and not tokenizer.chat_template:
        tokenizer.chat_template = VICUNA_PROMPT
    heads = DraftHeads.from_pretrained(heads, model) if heads else None
    return model.eval(), heads, tokenizer


# HydraConfig's settings: their names in a released config.json, and what a missing one means there
RELEASED = {
    "num_heads": ("hydra_num_heads", 4),
    "num_layers": ("hydra_num_layers", 1),
    "grounded": ("grounded_heads", False),
    "dropout": ("dropout_rate", 0.0),
}


def read_config(path_or_repo):
    """The config.json of saved heads; ValueError where there is none."""
    try:
        return json.loads(Path(cached_file(str(path_or_repo), "config.json")).read_text())
    except Exception as error:
        raise ValueError(f"cannot load draft heads from {path_or_repo}: {error}") from error


def from_pretrained(path_or_repo, model):
    """Heads in the released format, from a folder or the Hub; ValueError names what is wrong."""
    saved = read_config(path_or_repo)
    arch = saved.get("hydra_head_arch", "mlp")
    is_known = arch in ("mlp", "prefix-mlp") and not saved.get("hidden_state_offset")
    require(is_known, f"{path_or_repo}: only mlp and prefix-mlp heads without offset are supported")
    settings = {own: saved.get(name, default) for own, (name, default) in RELEASED.items()}
    heads = DraftHeads(HydraConfig(prefix_layer=arch == "prefix-mlp", **settings), model)
    fetch = partial(cached_file, str(path_or_repo))
    try:
        tree = fetch("tree.json", _raise_exceptions_for_missing_entries=False)
        heads.choices = json.loads(Path(tree).read_text()) if tree else None
        file = torch.load(fetch("hydra_lm_head.pt"), map_location="cpu", weights_only=True)
        embeddings = whole(model.get_input_embeddings().weight)
        copied = file.pop("input_embed_fn.weight", embeddings).to(embeddings)
        if not torch.equal(copied, embeddings):
            warnings.warn(f"{path_or_repo} was trained for a base with other embeddings")
        unused = ("embed_tokens.weight", "rotary_emb.inv_freq")
        file = {name: file[name] for name in file if not name.endswith(unused)}
        heads.load_state_dict(file)
    except Exception as error:  # truncated, hostile, or of another shape
        raise ValueError(f"{path_or_repo} does not fit this base model: {error}") from error

    # a block that is used three times is in the file three times
    for name, tensor in heads.state_dict().items():
        is_same = torch.equal(tensor.cpu(), file[name].to(tensor.dtype))
        require(is_same, f"{path_or_repo}: {name} must equal the other copies of the same block")
    return heads


def save_pretrained(heads, path):
    """Write heads in the released format: config.json, hydra_lm_head.pt; the tree as tree.json."""
    config = {name: getattr(heads.config, own) for own, (name, _) in RELEASED.items()}
    config["hydra_head_arch"] = "prefix-mlp" if heads.config.prefix_layer else "mlp"
    config["base_model_name_or_path"] = heads.base_name
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    torch.save(heads.state_dict(), path / "hydra_lm_head.pt.part")
    (path / "config.json.part").write_text(json.dumps(config, indent=1))
    (path / "tree.json.part").write_text(json.dumps(heads.choices))
    for part in path.glob("*.part"):
        os.replace(part, part.with_suffix(""))  # each file is whole, or it is not there


DraftHeads.from_pretrained = staticmethod(from_pretrained)
DraftHeads.save_pretrained = save_pretrained


def decoding(heads, *, tree=None, streamer=None, **options):
    """A decoding method for transformers: model.generate(ids, custom_generate=decoding(heads)).

    tree, streamer, options: as for `generate` (transformers hands its own streamer to no method).
    Honoured are lengths, EOS, padding, masks, and with do_sample=True temperature, top_k, top_p,
    min_p and the other warpers: greedy text stays what it was, sampled text keeps its distribution.
    ValueError names what no tree can serve, such as beams or penalties, which read the text so far.
    """

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        attention_mask = kwargs.pop("attention_mask", None)
        past_key_values = kwargs.pop("past_key_values", None)
        config = generation_config
        mode = config.get_generation_mode().value
        can_do = ("Warper", "MaxLengthCriteria", "EosTokenCriteria", "use_cache",
                  "cache_position", "position_ids", "logits_to_keep")
        asked = [type(part).__name__ for part in [*logits_processor, *stopping_criteria]]
        asked += kwargs
        asked += [name for name, value in vars(config).items() if "output_" in name and value]
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            asked.append("past_key_values")
        if mode not in ("greedy_search", "sample"):
            asked.append(mode)
        refused = [name for name in asked if not name.endswith(can_do)]
        require(not refused, f"decoding with a tree cannot honour {', '.join(refused)}")

        def accept(tokens, logits, tree):
            warped = logits_processor(None, logits.flatten(0, 1).float()).view_as(logits)
            if mode == "sample":
                return accept_sampling(tokens, warped, tree, temperature=1.0)
            return accept_greedy(tokens, warped, tree)

        sequences = generate(
            model, heads, input_ids, tree=tree, accept=accept, attention_mask=attention_mask,
            max_new_tokens=config.max_length - input_ids.shape[1], streamer=streamer,
            eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
            **options).sequences
        if not config.return_dict_in_generate:
            return sequences
        return transformers.generation.GenerateDecoderOnlyOutput(sequences=sequences)

    return decode


# heads for a base of one's own


def read_texts(paths):
    """The texts of files; ValueError names one that is no UTF-8 text."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    return texts


def encode(tokenizer, texts):
    """Token ids of texts, one behind the other, in three: to train on, choose a tree, compare."""
    ids = [token for text in texts for token in tokenizer(text).input_ids]
    ids = torch.tensor(ids, dtype=torch.int32)
    return ids.tensor_split((len(ids) * 90 // 100, len(ids) * 95 // 100))


def cut(ids, count, width, device):
    """At most count pieces of a text, (n, width), evenly spread."""
    require(len(ids) >= width, f"{len(ids)} held-out tokens are too few: more text")
    return ids.unfold(0, width, max(width, len(ids) // count))[:count].long().to(device)


def make_heads(kind, model, train_ids, tree_ids, folder, num_heads=4, **options):
    """The heads of a kind in folder, with their tree; trained there, or further, if need be.

    train_ids, tree_ids (M,): text to train on, and other text to choose the tree with.
    """
    config = HydraConfig(num_heads, **KINDS[kind])
    is_saved = (Path(folder) / "hydra_lm_head.pt").exists()
    heads = DraftHeads.from_pretrained(folder, model) if is_saved else DraftHeads(config, model)
    require(heads.config == config, f"{folder} holds other heads than {num_heads} of {kind}")
    if heads.choices is not None:  # the tree comes last
        print(f"hydra.py: {folder} holds finished heads, used as they are", file=sys.stderr)
        return heads
    try:
        train_heads(model, heads, train_ids, title=kind, **LOSSES[kind], **options)
    finally:  # also on Ctrl-C
        heads.save_pretrained(folder)
    heads.choices = fastest_tree(model, heads, cut(tree_ids, 64, 32, model.device))
    heads.save_pretrained(folder)
    return heads


# the demo: a base that trains itself on part of Python's manual, in a minute or two

DEMO_TOPICS = """for while if try with class function import return raise break continue pass del
assert global nonlocal async lambda""".split()
DEMO_TRAINING = dict(batch_size=4, seq_len=128, lr=4e-3)


def demo_text():
    """The prose of some of Python's own help topics, without syntax and examples."""
    paragraphs = "\n\n".join(topics[name] for name in DEMO_TOPICS).split("\n\n")
    is_prose = [len(part) > 50 and not re.search("^  |::=", part) for part in paragraphs]
    prose = [part for part, keep in zip(paragraphs, is_prose) if keep]
    return "\n".join(" ".join(re.sub(r'["*]', "", part).split()) for part in prose)


def demo_folder():
    """Where the demo lies: in the user's cache; another number where its recipe changes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hydra", "demo-2")


def train_demo(device):
    """Train the demo's base, its tokenizer and its Hydra++ heads into `demo_folder`."""
    text = demo_text()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=512, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    ids = torch.tensor(tokenizer(text).input_ids)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None, name_or_path="demo")
    model = transformers.LlamaForCausalLM(config).to(device)

    def loss(input_ids, labels):
        return model(input_ids, labels=labels).loss

    fit(model, loss, ids, title="demo", steps=1500, final_lr=0.1, **DEMO_TRAINING)
    set_dtype(model, torch.bfloat16 if model.device.type == "cuda" else torch.float32)

    # in a folder of its own first, so that the demo is whole or not there
    demo_folder().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=demo_folder().parent) as folder:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        heads_folder = Path(folder, "hydra++")
        make_heads("hydra++", model, ids, ids, heads_folder, steps=600, **DEMO_TRAINING)
        if not demo_folder().exists():  # another process may have been faster
            shutil.copytree(folder, demo_folder())


# ----------------------------------------------------------------------- 10 command line


class ColourStreamer(transformers.TextStreamer):
    """Prints text word by word; a word is green when its last token is an accepted draft."""

    green = False

    def put(self, value):
        """The prompt, or a step's tokens: accepted drafts, then the bonus token."""
        tokens = value.split(1)
        for token in tokens:
            super().put(token)  # prints the word before, in the last token's colour
            self.green = token is not tokens[-1]

    def on_finalized_text(self, text, stream_end=False):
        if self.green and has_colour():
            text = f"\033[32m{text}\033[0m"
        super().on_finalized_text(text, stream_end)


def has_colour():
    """Does standard output show colours, and are they wanted (no-color.org)?"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def speed(out):
    """Tokens a second of a single row; prefill gave the first."""
    return (len(out.new_tokens[0]) - 1) / max(out.seconds, 1e-9)


def figures(name, out):
    """A line about a run."""
    milliseconds = 1000 * out.seconds / max(len(out.emitted[0]), 1)
    return (f"{name:18}{out.tokens_per_step:5.2f} tokens/step  {milliseconds:6.2f} ms/step  "
            f"{speed(out):5.0f} tokens/s")


def distinct_4_grams(tokens):
    """Their share: text that loops has few, and is easy to guess."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))
    return len(set(grams)) / max(len(grams), 1)


def comparison(out, plain, accept):
    """How drafting changed speed and text, in a line."""
    gain = speed(out) / (speed(plain) or math.nan)
    text = "output identical to plain decoding's"
    if accept == "sampling":
        text = "drawn: differs from plain's own draw"
    elif out.new_tokens != plain.new_tokens:
        text = "output not plain decoding's"
    return f"{gain:.2f} x plain decoding; {text}"


def encode_prompt(tokenizer, prompt, is_chat):
    """Token ids (1, T) of the prompt, in the chat template if so asked."""
    if prompt is None:
        prompt = "What is a tree?" if is_chat else "The try statement"
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    if is_chat:
        message = dict(role="user", content=prompt)
        prompt = tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True)
    # most templates write the BOS themselves
    bare = not is_chat or tokenizer.chat_template == VICUNA_PROMPT
    return tokenizer(prompt, add_special_tokens=bare, return_tensors="pt").input_ids


def read_tree(name):
    """What --tree names: choices, or None for the heads' own."""
    named = {None: None, "none": [], "mc_sim_7b_63": MC_SIM_7B_63}
    if name in named:
        return named[name]
    choices = json.loads(Path(name).read_text())
    require(isinstance(choices, list), f"{name} holds no list of choices")
    return choices


def run(args):
    """Train or load, then stream the text to standard output, and figures to standard error."""
    say = partial(print, file=sys.stderr)
    if (args.model or args.heads or "demo") == "demo" and not demo_folder().exists():
        say("hydra.py: training the demo, once: two or three minutes")
        train_demo(args.device or "cpu")
    model, heads, tokenizer = load(args.model, args.heads, args.device, args.dtype)
    torch.manual_seed(args.seed)
    if args.train:
        require(args.save not in (None, args.model), "give --save, a folder for the heads")
        train_ids, tree_ids, _ = encode(tokenizer, read_texts(args.train))
        training = {name: getattr(args, name) for name in ("steps", "batch_size", "seq_len", "lr")}
        heads = make_heads(args.kind, model, train_ids, tree_ids, args.save, args.num_heads,
                           **training)

    is_chat = bool(tokenizer.chat_template) and not args.raw
    ids = encode_prompt(tokenizer, args.prompt, is_chat).to(model.device)
    tree = choose_tree(heads, read_tree(args.tree))
    names = "max_new_tokens max_context accept temperature epsilon delta cuda_graph compile"
    options = {name: getattr(args, name) for name in names.split()}
    streamer = ColourStreamer(tokenizer, skip_prompt=is_chat, skip_special_tokens=True)
    if has_colour() and tree.num_nodes > 1:
        say("\033[32mgreen\033[0m: accepted drafts")
    out = generate(model, heads, ids, tree=tree, streamer=streamer, **options)
    if tree.num_nodes == 1:
        say("", figures("plain decoding", out), sep="\n")
    else:
        torch.manual_seed(args.seed)
        plain = generate_plain(model, ids, **options)
        say("", figures("plain decoding", plain), sep="\n")
        say(figures(f"{tree.num_nodes} nodes", out), comparison(out, plain, args.accept), sep="\n")

    say(f"{distinct_4_grams(out.new_tokens[0]):.0%} of the text's 4-grams are distinct")
    sizes = [sum(weight.nbytes for weight in part.parameters()) >> 20
             for part in (model, heads) if part]
    say(f"MiB: base {sizes[0]}, heads {sum(sizes[1:])}")
    if model.device.type == "cuda":
        say(f"MiB on the GPU at most: {torch.cuda.max_memory_allocated() >> 20}")
    if not heads:
        say("no draft heads: --train TEXT --save FOLDER makes some")


# (option, default, what it is); a default of None is told in words
OPTIONS = {
    "model and prompt": [
        ("--model", None, "demo, vicuna-7b, vicuna-13b, vicuna-33b, a folder, or a name on the Hub "
         "(default: the base that --heads name, or demo, which trains itself the first time)"),
        ("--heads", None, "draft heads: a folder, or a name on the Hub (default: the model's own)"),
        ("--prompt", None, "text to go on with; - reads standard input (default: one that fits)"),
        ("--raw", False, "take the prompt as it is, without a chat template"),
        ("--device", None, "cuda, cpu or mps (default: cuda if there is one)"),
        ("--dtype", None, "of the weights (default: float32 on a CPU, elsewhere as saved)"),
        ("--seed", 0, "of sampling and training"),
    ],
    "decoding": [
        ("--max-new-tokens", 128, "stop after so many tokens"),
        ("--max-context", None, "stop at so many, prompt included (default: what is needed)"),
        ("--accept", "greedy", "greedy writes what plain decoding writes, sampling draws from the "
         "same distribution, typical takes whatever token is likely enough"),
        ("--temperature", 1.0, "of sampling and typical; 0 is greedy"),
        ("--epsilon", 0.09, "typical takes a token that is more probable than this"),
        ("--delta", 0.3, "or than this times exp(-entropy), if that is less"),
        ("--tree", None, "mc_sim_7b_63, the paper's; none, for plain decoding; or a JSON file of "
         "choices (default: the heads' own, else mc_sim_7b_63)"),
        ("--no-cuda-graph", False, "launch each kernel of a step instead of a recorded step"),
        ("--compile", False, "torch.compile the step: a minute or more, then faster steps"),
    ],
    "training draft heads": [
        ("--train", None, "text files to train on; needs --save (default: no training)"),
        ("--save", None, "folder for the trained heads (no default)"),
        ("--kind", "hydra++", "which heads to train"),
        ("--num-heads", 4, "how many of them"),
        ("--steps", 600, "training steps"),
        ("--batch-size", 8, "windows of text in a step"),
        ("--seq-len", 128, "tokens in a window"),
        ("--lr", 1e-3, "the highest learning rate"),
    ],
}
CHOICES = {
    "--dtype": ["float32", "float16", "bfloat16"],
    "--accept": ["greedy", "sampling", "typical"],
    "--kind": KINDS,
}
TYPES = {"--max-context": int}


def make_parser():
    """The parser for OPTIONS."""
    parser = argparse.ArgumentParser(
        prog="hydra.py", description="Decode with Hydra draft heads, or train them.")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, default, text in options:
            if default is False:
                group.add_argument(name, action="store_true", help=text)
                continue
            told = "" if default is None else f" (default: {default})"
            kind = str if default is None else type(default)
            group.add_argument(name, default=default, type=TYPES.get(name, kind), help=text + told,
                               choices=CHOICES.get(name), nargs="+" if name == "--train" else None)
    return parser


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    args.cuda_graph = False if args.no_cuda_graph else None
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes
        sys.stdout = sys.stderr = open(os.devnull, "w")
    transformers.utils.logging.disable_progress_bar()
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        advice = ""
        if isinstance(error, torch.OutOfMemoryError):
            advice = "; use a smaller --tree, --max-context or --batch-size"
        print(f"hydra.py: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
