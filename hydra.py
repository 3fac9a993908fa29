# SPDX-License-Identifier: MIT
"""Hydra: sequentially dependent draft heads for Medusa decoding (arXiv 2402.05109), in one file.

A language model reads all of its weights to produce one token. Reading them for one token or for
a few dozen takes about the same time, so decoding gets faster if several tokens can be checked in
one forward pass of the base model. Hydra guesses a small *tree* of continuations with cheap draft
heads, verifies the whole tree in one forward, and keeps the longest path that the base model
itself would have written. Every decode step does the same four things:

    length = number of committed tokens, whose keys and values are in the cache
    root   = the token that the base model has chosen but not yet read
    hidden = the base model's last hidden state, the one that predicted root

    repeat:
        1 draft    tokens of the tree below root: head i reads hidden and the embeddings of the
                   i+1 tokens on its node's own path, and its best guesses are the children
        2 verify   one forward of the base model over all N nodes; a node sees the committed
                   prefix, its ancestors and itself (the tree attention mask), nothing else
        3 accept   the longest path whose every token is what the base model wanted there;
                   the base model's next token after that path is a free extra, the bonus token
        4 commit   the accepted path's keys and values move up behind the prefix;
                   length += accepted drafts + 1;  root = bonus token;  hidden = state at the
                   last accepted node

Medusa's head i sees hidden alone: it must guess the token at distance i + 2 without knowing which
tokens stand in between. That one difference is `head_input` below, and it is the whole paper.

The running example is this tree of seven nodes. Node 0, the root, is always right; every other
node is named by its *choice*, the path of child ranks that leads to it:

                  0 "sat"                       node  choice     parent  depth  rank
                 /       \\                       1    [0]           0      1     0
            1 "on"       2 "down"                2    [1]           0      1     1
            /    \\            \\                  3    [0, 0]        1      2     0
      3 "the"    4 "a"       5 "."               4    [0, 1]        1      2     1
         |                                       5    [1, 0]        2      2     0
      6 "mat"                                    6    [0, 0, 0]     3      3     0

One idea keeps the file small: every step has the same shapes and reads nothing back to the host.
A tree always has N nodes, a path is always depth + 1 nodes (padded with its last node), and every
row of the batch carries its own length as a tensor. Batches in which every row accepts another
number of tokens, CUDA graphs and torch.compile all follow from that choice.

Shapes: B batch, N tree nodes, K draft heads, D hidden size, V vocabulary, T tokens, S cache slots,
L layers, Dh width of an attention head. Heads are counted from 0: the base model at position t
predicts token t + 1, head i predicts token t + 2 + i.

Contents: 1 draft heads, 2 tree, 3 tree attention, 4 drafting, 5 acceptance, 6 KV cache, 7 decode
loop, 8 training, 9 models, 10 command line. Nothing needs a section below its own.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Cache, TextStreamer


# ------------------------------------------------------------------------------ 1 draft heads

@dataclass
class HydraConfig:
    """Which draft heads to build: Medusa, Hydra and Hydra++ differ in these five values only.

    num_heads: K, how many tokens below the root can be guessed.  num_layers: blocks of each MLP.
    grounded: False is Medusa (head i sees the hidden state alone), True is Hydra.
    prefix_layer: True adds Hydra++'s extra decoder layer over the base's hidden states.
    dropout: probability, before every block and every lm_head, in training only.
    """
    num_heads: int = 4
    num_layers: int = 1
    grounded: bool = True
    prefix_layer: bool = False
    dropout: float = 0.0


def head_input(hidden, embeddings):
    """The paper's idea in one line: a head sees the hidden state *and* the tokens guessed so far.

    hidden (..., D): the base's state h[t], or Hydra++'s p[t].  embeddings (..., i+1, D): the
    base's input embeddings of tokens t+1 .. t+1+i, oldest first.  Returns (..., (i+2)*D): the
    hidden state, then the embeddings in order.  Training and drafting both call it.  Paper: 3.

    >>> head_input(torch.tensor([1., 2.]), torch.tensor([[3., 4.], [5., 6.]]))
    tensor([1., 2., 3., 4., 5., 6.])
    """
    return torch.cat([hidden, embeddings.flatten(-2)], dim=-1)


class ResBlock(nn.Module):
    """y = R(x) + SiLU(W x + b), with W zero at first, so that a new block changes little.

    R is the identity, or a projection where the width changes: only in the first block of a
    grounded head, which takes (i+2)*D to D.
    """

    def __init__(self, width_in, width_out):
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        nn.init.zeros_(self.linear.weight)
        same = width_in == width_out
        self.res_connection = nn.Identity() if same else nn.Linear(width_in, width_out)

    def forward(self, x):
        return self.res_connection(x) + F.silu(self.linear(x))


class DraftHead(nn.Module):
    """One head: an MLP of `num_layers` blocks, then an lm_head of its own."""

    def __init__(self, width_in, base_lm_head, config):
        super().__init__()
        vocab, width = base_lm_head.weight.shape
        # subtle: all blocks after the first are one module, used several times over. The released
        # heads were trained so: "4 layers" is one conditioned block and one shared block, thrice.
        # Without conditioning the widths agree, and even the first block is that same module.
        first = ResBlock(width_in, width)
        shared = first if width_in == width else ResBlock(width, width)
        self.blocks = nn.ModuleList([first] + [shared] * (config.num_layers - 1))
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(width, vocab)
        with torch.no_grad():
            self.lm_head.weight.copy_(base_lm_head.weight)
            self.lm_head.bias.zero_()
            if base_lm_head.bias is not None:
                self.lm_head.bias.copy_(base_lm_head.bias)

    def forward(self, x):
        for block in self.blocks:
            x = block(self.dropout(x))
        return self.lm_head(self.dropout(x))


class DraftHeads(nn.Module):
    """K draft heads for one base model, and the prefix layer if there is one.

    config: a HydraConfig.  model: any decoder-only causal language model of transformers; the
    heads take its widths, dtype and device, start from its lm_head, and keep no reference to it.
    """

    def __init__(self, config, model):
        super().__init__()
        self.config = config
        self.choices = None  # the tree these heads draft best, where one has been searched
        base_lm_head = model.get_output_embeddings()
        width = base_lm_head.weight.shape[1]
        self.heads = nn.ModuleList(
            DraftHead((i + 2) * width if config.grounded else width, base_lm_head, config)
            for i in range(config.num_heads))
        self.prefix_layer = make_prefix_layer(model) if config.prefix_layer else None
        self.to(model.device, model.dtype)

    def forward(self, i, hidden, embeddings):
        """Logits of head i: hidden (..., D), embeddings (..., i+1, D) -> (..., V)."""
        if not self.config.grounded:
            return self.heads[i](hidden)
        hidden = hidden.expand(*embeddings.shape[:-2], -1)
        return self.heads[i](head_input(hidden, embeddings))

    def read_prefix(self, hidden, **where):
        """What the heads see in place of hidden (B, T, D): the prefix layer's output, if any.

        where: attention_mask, position_ids and past_key_values, as the base model takes them;
        without them hidden is a whole sequence from its start, read causally.
        """
        if self.prefix_layer is None:
            return hidden
        return self.prefix_layer(inputs_embeds=hidden, **where).last_hidden_state


def make_prefix_layer(model):
    """Hydra++'s prefix layer: a decoder of the base's own architecture with a single layer.

    It reads the base's final hidden states as if they were embeddings, so p[t] can attend to
    h[0..t].  To the KV cache it is one more layer behind the base's.  Paper: 4 (Hydra++).
    """
    config = copy.deepcopy(model.config)
    num_base_layers = config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    config.num_hidden_layers, config.use_cache = 1, False
    layer = AutoModel.from_config(config)
    layer.set_input_embeddings(None)  # never used: it is fed hidden states
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = num_base_layers  # or it would overwrite the base's layer 0
    return layer


# -------------------------------------------------------------------------------------- 2 tree

@dataclass
class Tree:
    """A tree of N nodes, sorted by (depth, choice); node 0 is the root and its own parent.

    choices: the N - 1 choices as a list.  parents, depths, ranks (N,): each node's parent, its
    distance from the root, its rank among its parent's guesses.  paths (N, depth+1): the nodes
    from the root to each node, padded with that node.  mask (N, N): see section 3.
    """
    choices: list
    parents: torch.Tensor
    depths: torch.Tensor
    ranks: torch.Tensor
    paths: torch.Tensor
    mask: torch.Tensor
    levels: list = field(init=False)

    def __post_init__(self):
        self.levels = [Level.below(self, depth) for depth in range(self.paths.shape[1] - 1)]

    @property
    def num_nodes(self):
        return len(self.choices) + 1

    def to(self, device):
        """The same tree with its tensors on another device."""
        moved = copy.copy(self)
        for name in ("parents", "depths", "ranks", "paths", "mask"):
            setattr(moved, name, getattr(self, name).to(device))
        moved.levels = [level.to(device) for level in self.levels]
        return moved


@dataclass
class Level:
    """What drafting one level needs: n nodes of one depth are expanded into m children.

    paths (n, depth+1): the path of each expanded node.  parent, rank (m,): for each child, in
    node order, its parent's place among the n and its rank.  width: the highest rank plus one.
    """
    paths: torch.Tensor
    parent: torch.Tensor
    rank: torch.Tensor
    width: int

    @classmethod
    def below(cls, tree, depth):
        children = (tree.depths == depth + 1).nonzero()[:, 0]
        expanded, parent = tree.parents[children].unique(return_inverse=True)
        rank = tree.ranks[children]
        return cls(tree.paths[expanded, :depth + 1], parent, rank, int(rank.max()) + 1)

    def to(self, device):
        tensors = (self.paths, self.parent, self.rank)
        return Level(*(tensor.to(device) for tensor in tensors), self.width)


def build_tree(choices):
    """From a list of choices to a Tree.

    choices: lists of child ranks, in any order; `[0, 2]` is the third-best child of the best
    child of the root.  Ranks may have gaps and any node may be expanded, but a choice's parent
    must be a choice too.  No choices at all give the one-node tree: plain decoding.
    Raises ValueError naming the choice that is malformed.  Paper: 2 (as in Medusa).

    >>> tree = build_tree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    >>> tree.parents.tolist(), tree.depths.tolist(), tree.ranks.tolist()
    ([0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 0, 1, 0, 0])
    >>> tree.paths[4].tolist(), tree.paths[6].tolist()
    ([0, 1, 4, 4], [0, 1, 3, 6])
    """
    check_choices(choices)
    choices = sorted((list(choice) for choice in choices), key=lambda choice: (len(choice), choice))
    node_of = {(): 0} | {tuple(choice): node for node, choice in enumerate(choices, start=1)}
    parents = [0] + [node_of[tuple(choice[:-1])] for choice in choices]
    depths = [0] + [len(choice) for choice in choices]
    ranks = [0] + [choice[-1] for choice in choices]
    paths = [[0] * (depths[-1] + 1)]
    for node in range(1, len(parents)):
        # the parent's path up to the parent, then this node until the row is full
        depth = depths[node]
        paths.append(paths[parents[node]][:depth] + [node] * (depths[-1] + 1 - depth))
    parents = torch.tensor(parents)
    return Tree(choices, parents, torch.tensor(depths), torch.tensor(ranks), torch.tensor(paths),
                tree_attention_mask(parents))


def check_choices(choices):
    """Raise ValueError with the first choice that is not a path in a tree."""
    if not isinstance(choices, (list, tuple)):
        raise ValueError(f"choices must be a list of lists of ranks, not {choices!r}")
    seen = set()
    for choice in choices:
        ranks = choice if isinstance(choice, (list, tuple)) else [None]
        if not ranks or not all(type(rank) is int and rank >= 0 for rank in ranks):
            raise ValueError(f"choice {choice!r} must be a non-empty list of ranks 0, 1, 2, ...")
        if tuple(choice) in seen:
            raise ValueError(f"choice {choice!r} is there twice")
        seen.add(tuple(choice))
    for choice in choices:
        if len(choice) > 1 and tuple(choice[:-1]) not in seen:
            raise ValueError(f"choice {choice!r} has no parent: add {list(choice[:-1])!r}")


# The tree that Medusa and Hydra were published with: for each expanded choice, its children's ranks
MC_SIM_7B_63 = [[*parent, rank] for parent, count in {
    (): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1,
    (9,): 1, (0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1,
    (0, 7): 1, (1, 0): 2, (2, 0): 1, (0, 0, 0): 2}.items() for rank in range(count)]


# ---------------------------------------------------------------------------- 3 tree attention

def tree_attention_mask(parents):
    """Which node may attend to which: ancestors and itself.

    parents (N,): each node's parent, parents before children, the root its own.  Returns
    (N, N) bool; row attends to column.  Siblings and cousins never see each other, so each path
    is computed as if it stood alone behind the prefix, and one forward verifies all of them.

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


def additive_columns(mask, dtype):
    """A mask as attention takes it: 0 where a node may look, the most negative number elsewhere.

    mask (T, T) bool -> (T, T + 2), with a column of "always" in front (it will stand for every
    committed slot) and a column of "never" behind (for the free slots).
    """
    columns = F.pad(F.pad(mask, (1, 0), value=True), (0, 1), value=False)
    return torch.zeros(columns.shape, dtype=dtype, device=mask.device).masked_fill(
        ~columns, torch.finfo(dtype).min)


def mask_behind_prefix(columns, length, num_slots):
    """Where the tree sits in the cache: (B, 1, T, S), what each node may see of each slot.

    columns (T, T + 2) from `additive_columns`; length (B,): committed slots of each row.  The
    tree occupies slots length .. length + T - 1.  Slot s is the tree's column s - length: below 0
    it is the prefix, past T - 1 it is free.  One gather builds the mask for all layers.
    """
    slots = torch.arange(num_slots, device=length.device)
    column = (slots - length[:, None] + 1).clamp(0, columns.shape[1] - 1)  # (B, S)
    return columns[:, column].transpose(0, 1)[:, None]                     # (B, 1, T, S)


# ---------------------------------------------------------------------------------- 4 drafting

def draft_tree(heads, tree, root, hidden, embed):
    """Fill the tree with guesses, level by level, one head call per level.

    heads: DraftHeads.  tree: Tree.  root (B,): the token at node 0.  hidden (B, D): the state
    that predicted it.  embed: the base's input embedding, tokens -> (..., D).
    Returns tokens (B, N).  A child of rank r is the r-th best guess of its *own parent's* head
    call, which has read the tokens on that parent's path.  Paper: 3.
    """
    tokens = root[:, None]                                            # (B, 1)
    for depth, level in enumerate(tree.levels):
        path_tokens = tokens[:, level.paths]                          # (B, n, depth+1)
        logits = heads(depth, hidden[:, None], embed(path_tokens))    # (B, n, V)
        guesses = logits.topk(level.width).indices                    # (B, n, width), best first
        # Medusa's heads read no tokens, so there is one row of guesses for the whole level
        guesses = guesses.expand(-1, len(level.paths), -1)
        tokens = torch.cat([tokens, guesses[:, level.parent, level.rank]], dim=1)
    return tokens


# -------------------------------------------------------------------------------- 5 acceptance

def longest_accepted_path(passes, tree, score=None):
    """The deepest node that passes together with all of its ancestors.

    passes (B, N) bool: does the node's token agree with the base model?  The root always does.
    score (B, N): each node's own contribution; among paths of equal depth the one with the
    largest sum wins, and without a score the first in node order.  Returns node (B,).

    >>> tree = build_tree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    >>> T, F = True, False
    >>> longest_accepted_path(torch.tensor([[T, T, F, F, T, T, T]]), tree)  # 3 breaks 6, 2 breaks 5
    tensor([4])
    """
    passes = passes | (tree.depths == 0)
    alive = (passes[:, None] | ~tree.mask).all(-1)                    # (B, N) whole path passes
    depth = torch.where(alive, tree.depths, -1)
    longest = depth == depth.max(-1, keepdim=True).values
    if score is None:
        return longest.int().argmax(-1)
    path_score = torch.where(tree.mask, score[:, None], 0).sum(-1)
    return torch.where(longest, path_score, -torch.inf).argmax(-1)


def accept_greedy(tokens, logits, tree):
    """Accept what plain greedy decoding would have written: a token passes when it is the argmax.

    tokens (B, N), logits (B, N, V): the base's logits at every node.  Returns node (B,), the last
    accepted one, and next_token (B,), the base's own choice after it.  Paper: 2.
    """
    return follow(logits.argmax(-1), tokens, tree)


def accept_sampling(tokens, logits, tree, temperature):
    """Exact sampling (not in the paper): draw the base's token at each node, follow the draws.

    Shapes as in `accept_greedy`.  A child passes when it is what its parent drew, so whatever was
    drafted, each emitted token is a draw from softmax(logits / temperature): the output has
    exactly the distribution of plain sampling.  Siblings must hold distinct tokens (top-k does).
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    # subtle: argmax of p / e with e ~ Exponential(1) is a draw from p, without asking the host
    return follow((probs / torch.empty_like(probs).exponential_()).argmax(-1), tokens, tree)


def follow(wanted, tokens, tree):
    """Walk down the tree along the tokens that the base wants after each node, wanted (B, N)."""
    passes = tokens == wanted[:, tree.parents]
    node = longest_accepted_path(passes, tree)
    return node, wanted.gather(1, node[:, None])[:, 0]


def accept_typical(tokens, logits, tree, temperature, epsilon=0.09, delta=0.3):
    """Typical acceptance: a token passes when it is likely enough, so text may leave plain greedy.

        p(token | its path) > min(epsilon, delta * exp(-H)),    H the entropy of p

    where the base is unsure (H large) even improbable tokens pass.  Shapes as in `accept_greedy`;
    p is the softmax of the parent's logits / temperature.  Among longest paths the most likely
    wins, and the bonus token is the argmax: no random number is drawn.  Paper: 2 (as in Medusa).
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)        # (B, N, V)
    entropy = -(probs * torch.log(probs + 1e-5)).sum(-1)
    threshold = (delta * torch.exp(-entropy)).clamp(max=epsilon)       # (B, N)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    token_probs = probs[rows, tree.parents, tokens]                    # (B, N)
    passes = token_probs > threshold[:, tree.parents]
    node = longest_accepted_path(passes, tree, score=token_probs.log())
    return node, logits.argmax(-1).gather(1, node[:, None])[:, 0]


# ---------------------------------------------------------------------------------- 6 KV cache

class TreeCache(Cache):
    """Keys and values of S slots for each row and layer; transformers' layers write into it.

    A row's first `length` slots are its committed prefix; the tokens of a forward pass are
    written behind it, at the slots in `self.slots` (B, T), and everything further is scratch.
    The prefix layer is simply one more layer.  Tensors are made at a layer's first update, so
    the number of key-value heads, their width, dtype and device come from the model itself.
    """

    def __init__(self, num_slots):
        super().__init__(layers=[])
        self.num_slots = num_slots
        self.slots = None
        self.keys, self.values = {}, {}  # by layer: (B, H, S, Dh) each

    def update(self, key, value, layer_idx, *_):
        """Write key and value (B, H, T, Dh) at `slots`; return all slots of that layer."""
        if layer_idx not in self.keys:
            shape = (*key.shape[:2], self.num_slots)
            self.keys[layer_idx] = key.new_zeros(*shape, key.shape[3])
            self.values[layer_idx] = value.new_zeros(*shape, value.shape[3])
        for stored, new in ((self.keys[layer_idx], key), (self.values[layer_idx], value)):
            stored.scatter_(2, self.slots[:, None, :, None].expand_as(new), new)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx=0):
        """Always 0: positions and masks are given with every call, never derived from here."""
        return 0

    def tensors(self):
        """All key and value tensors, each (B, H, S, Dh)."""
        return [*self.keys.values(), *self.values.values()]


def commit_path(kv, length, path):
    """Move the accepted path's rows to the end of the committed prefix, in place.

    kv (B, H, S, Dh): keys or values whose tree starts at slot length (B,).  path (B, depth+1):
    nodes from the root to the last accepted one, padded with it (what padding writes is scratch).

        prefix | sat  on  down  the  a  .  mat        path 0 1 4 -> slots 0 1 4 of the tree
        prefix   sat  on  a   | the  a  .  mat        length += 3, the rest is scratch
    """
    source = length[:, None] + path                                        # (B, depth+1)
    target = length[:, None] + torch.arange(path.shape[1], device=path.device)
    index = [slots[:, None, :, None].expand(-1, kv.shape[1], -1, kv.shape[3])
             for slots in (source, target)]
    kv.scatter_(2, index[1], kv.gather(2, index[0]))


# ------------------------------------------------------------------------------- 7 decode loop

class Decoder:
    """The state of one decoding batch and the step that advances it.

    model: the base.  heads: DraftHeads, or None with a one-node tree.  tree: Tree.  batch_size: B.
    max_context: tokens, prompt included, that a row may grow to.  accept: a function
    (tokens, logits, tree) -> (node, next_token) like `accept_greedy`.
    Raises ValueError when tree, heads and model do not fit each other.
    """

    def __init__(self, model, heads, tree, batch_size, max_context, accept=None):
        check_fit(model, heads, tree, max_context)
        device = model.device
        self.model, self.heads, self.tree = model, heads, tree.to(device)
        self.accept = accept or accept_greedy
        self.embed = model.get_input_embeddings()
        self.max_context = max_context
        self.cache = TreeCache(max_context + tree.num_nodes)
        self.columns = additive_columns(self.tree.mask, model.dtype)
        self.rows = torch.arange(batch_size, device=device)
        self.length = torch.zeros_like(self.rows)       # (B,) committed tokens
        self.root = torch.zeros_like(self.rows)         # (B,) chosen, not yet committed
        self.active = torch.ones_like(self.rows)        # (B,) 0 once a row has finished
        self.hidden = torch.zeros(batch_size, self.embed.embedding_dim, dtype=model.dtype,
                                  device=device)        # (B, D) the state that predicted root

    def forward(self, tokens, depths, columns, logits_to_keep=0):
        """Base model and prefix layer over tokens (B, T) behind each row's prefix.

        depths (T,) and columns (T, T + 2) say how the tokens hang together: as a tree, or as a
        chain.  Returns logits (B, T, V) and what the heads see (B, T, D).
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        self.cache.slots = self.length[:, None] + places
        where = dict(
            attention_mask=mask_behind_prefix(columns, self.length, self.cache.num_slots),
            position_ids=(self.length[:, None] + depths).clamp(max=self.max_context - 1),
            past_key_values=self.cache, use_cache=True)
        out = self.model(input_ids=tokens, output_hidden_states=True,
                         logits_to_keep=logits_to_keep, **where)
        hidden = out.hidden_states[-1]  # after the final norm
        return out.logits, self.heads.read_prefix(hidden, **where) if self.heads else hidden

    def prefill(self, input_ids, attention_mask=None):
        """Read the prompts and choose each row's first token (B,), which becomes its root.

        input_ids (B, T), attention_mask (B, T): 0 marks padding, on either side.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # bring padding to the right, so that every row starts at slot 0; what it writes lies
        # behind the row's length and is overwritten
        order = attention_mask.bool().int().argsort(dim=1, descending=True, stable=True)
        tokens, length = input_ids.gather(1, order), attention_mask.bool().sum(1)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        chain = additive_columns(places[:, None] >= places, self.model.dtype)
        self.length.zero_()
        logits, hidden = self.forward(tokens, places, chain, logits_to_keep=length - 1)
        last = (self.rows, length - 1)
        # every row kept the last position of every row: its own is on the diagonal
        _, first = self.accept(tokens[last][:, None], logits[self.rows, self.rows][:, None],
                               build_tree([]).to(tokens.device))
        self.length.copy_(length), self.root.copy_(first), self.hidden.copy_(hidden[last])
        self.active.fill_(1)
        return first

    def step(self):
        """One decode step: returns tokens (B, depth+1) and counts (B,), how many of them count.

        Fixed shapes, state updated in place, nothing read by the host.
        """
        tokens = self.draft()
        logits, hidden = self.verify(tokens)
        return self.accept_and_commit(tokens, logits, hidden)

    def draft(self):
        return draft_tree(self.heads, self.tree, self.root, self.hidden, self.embed)

    def verify(self, tokens):
        return self.forward(tokens, self.tree.depths, self.columns)

    def accept_and_commit(self, tokens, logits, hidden):
        node, bonus = self.accept(tokens, logits, self.tree)
        path = self.tree.paths[node]                                    # (B, depth+1)
        for kv in self.cache.tensors():
            commit_path(kv, self.length, path)
        accepted = self.tree.depths[node]                               # (B,) without the root
        self.length.add_((accepted + 1) * self.active).clamp_(max=self.max_context)
        self.root.copy_(bonus)
        self.hidden.copy_(hidden[self.rows, node])
        # what the step emits: the path below the root, then the bonus token
        emitted = tokens.gather(1, path).roll(-1, dims=1)
        emitted.scatter_(1, accepted[:, None], bonus[:, None])
        return emitted, accepted + 1


def check_fit(model, heads, tree, max_context):
    """Raise ValueError when the tree asks more than heads and vocabulary have, and the like."""
    depth, vocab = tree.paths.shape[1] - 1, model.get_input_embeddings().num_embeddings
    num_heads = heads.config.num_heads if heads else 0
    if depth > num_heads:
        raise ValueError(f"choice {tree.choices[-1]} is {depth} deep but there are {num_heads} "
                         "draft heads: cut the tree, or train more heads")
    for choice in tree.choices:
        if choice[-1] >= vocab:
            raise ValueError(f"choice {choice} asks for rank {choice[-1]} of {vocab} tokens")
    limit = getattr(model.config, "max_position_embeddings", None) or max_context
    if not 0 < max_context <= limit:
        raise ValueError(f"max_context must lie between 1 and the model's {limit}: {max_context}")
    if heads:
        own, base = (tuple(m.weight.shape) for m in (heads.heads[0].lm_head,
                                                     model.get_output_embeddings()))
        if own != base:
            raise ValueError(f"the heads are made for V, D = {own} but the base has {base}")


@dataclass
class Output:
    """What `generate` returns.

    sequences (B, T'): the prompt as given, new tokens from column T on, then padding.
    emitted: for each row the tokens of each step, accepted drafts + 1 (the bonus token).
    seconds: wall-clock time of the steps, prefill left out.
    """
    sequences: torch.Tensor
    emitted: list
    seconds: float

    @property
    def tokens_per_step(self):
        """Accepted drafts + 1, averaged over all steps of all rows; 1.0 for plain decoding."""
        counts = [count for row in self.emitted for count in row]
        return sum(counts) / max(len(counts), 1)


@torch.inference_mode()
def generate(model, heads, input_ids, *, tree=None, accept="greedy", temperature=1.0, epsilon=0.09,
             delta=0.3, max_new_tokens=128, eos_token_id=None, pad_token_id=None,
             attention_mask=None, streamer=None, max_context=None):
    """Decode with draft heads; greedy and sampling give what plain decoding gives.

    input_ids (B, T), padded on either side under attention_mask (B, T).  tree: a Tree, a list of
    choices, or None for the heads' own, else MC_SIM_7B_63 cut to fit.  accept: "greedy",
    "typical" or "sampling"; temperature 0 is greedy.  eos_token_id: one id, several, or None.
    Each row stops exactly at EOS, after max_new_tokens, or when it holds max_context tokens
    (default: the model's longest).  streamer: a transformers streamer, for B = 1; it gets the
    prompt, then each step's tokens.  Returns an Output.  Raises ValueError on bad arguments.
    """
    tree = tree if isinstance(tree, Tree) else build_tree(default_choices(heads, model)
                                                         if tree is None else tree)
    eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    lengths = attention_mask.bool().sum(1).tolist()
    max_context = max_context or min(
        getattr(model.config, "max_position_embeddings", None) or sys.maxsize,
        max(lengths) + max_new_tokens)
    check_request(input_ids, lengths, max_new_tokens, max_context, streamer)
    decoder = Decoder(model, heads, tree, len(input_ids), max_context,
                      choose_acceptance(accept, temperature, epsilon, delta))
    room = [min(max_new_tokens, max_context - length) for length in lengths]
    new, emitted, running = [[] for _ in room], [[] for _ in room], set(range(len(room)))

    def take(tokens, counts):
        """Hand out a step's tokens; retire the rows that reach their end."""
        for row in sorted(running):
            fresh = tokens[row][:counts[row]][:room[row] - len(new[row])]
            end = next((k + 1 for k, token in enumerate(fresh) if token in eos), None)
            new[row] += fresh[:end]
            if streamer and fresh:
                streamer.put(torch.tensor(fresh[:end]))
            if end or len(new[row]) >= room[row]:
                running.remove(row)
                decoder.active[row] = 0

    if streamer:
        streamer.put(input_ids.cpu())
    first = decoder.prefill(input_ids, attention_mask).tolist()
    start = time.perf_counter()
    take([[token] for token in first], [1] * len(first))
    while running:
        tokens, counts = (tensor.tolist() for tensor in decoder.step())  # the host's one look
        for row in running:
            emitted[row].append(counts[row])
        take(tokens, counts)
    seconds = time.perf_counter() - start
    if streamer:
        streamer.end()
    if pad_token_id is None:
        pad_token_id = min(eos, default=0)
    width = max(map(len, new))
    padded = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in new])
    padded = padded.to(input_ids).reshape(len(new), width)
    return Output(torch.cat([input_ids, padded], dim=1), emitted, seconds)


def generate_plain(model, input_ids, **options):
    """Plain decoding: the same loop with the one-node tree. Arguments as for `generate`."""
    return generate(model, None, input_ids, tree=[], **options)


def default_choices(heads, model):
    """The heads' own tree, else the published one as far as heads and vocabulary reach."""
    if heads is None:
        return []
    vocab = model.get_input_embeddings().num_embeddings
    return heads.choices or [choice for choice in MC_SIM_7B_63
                             if len(choice) <= heads.config.num_heads and max(choice) < vocab]


def choose_acceptance(name, temperature, epsilon, delta):
    """The acceptance function of that name with its settings filled in."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < epsilon <= 1 or not 0 < delta <= 1:
        raise ValueError(f"epsilon and delta must lie in (0, 1], not {epsilon} and {delta}")
    rules = {"greedy": accept_greedy,
             "typical": partial(accept_typical, temperature=temperature, epsilon=epsilon,
                                delta=delta),
             "sampling": partial(accept_sampling, temperature=temperature)}
    if name not in rules:
        raise ValueError(f"accept must be one of {', '.join(rules)}, not {name!r}")
    return accept_greedy if temperature == 0 else rules[name]


def check_request(input_ids, lengths, max_new_tokens, max_context, streamer):
    """Raise ValueError with one line that says what to change."""
    if min(lengths, default=0) == 0:
        raise ValueError("the prompt is empty: give at least one token in every row")
    if max(lengths) > max_context:
        raise ValueError(f"the prompt has {max(lengths)} tokens but the context holds "
                         f"{max_context}: shorten it")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if streamer and len(input_ids) > 1:
        raise ValueError("a streamer shows one row: pass one prompt, or no streamer")


# --------------------------------------------------------------------------------- 8 training

def head_losses(heads, hidden, embeddings, input_ids, base_logits, labels=None, *, lm_weight=1.0,
                teacher_weight=0.0):
    """Teacher forcing: every head at every position guesses its token, given the true ones before.

    Head i at position t sees hidden[t] and the embeddings of tokens t+1 .. t+1+i, and is asked for
    s = t + 2 + i.  lm loss: cross-entropy against token s.  teacher loss: cross-entropy against
    the base's own distribution for s, which stands at position s - 1.

    hidden (B, T, D): what the heads see.  embeddings (B, T, D), input_ids (B, T), base_logits
    (B, T, V) of the same text.  labels (B, T): -100 where a token does not count; default all do.
    Returns (K,): each head's mean loss over the positions that count.  Paper: 3 and 4.
    """
    labels = input_ids if labels is None else labels
    length = input_ids.shape[1]

    def loss(i):
        n = length - 2 - i  # positions that have a target
        path = torch.stack([embeddings[:, j:j + n] for j in range(1, i + 2)], dim=-2)
        logits = heads(i, hidden[:, :n], path).flatten(0, 1).float()       # (B*n, V)
        target = labels[:, i + 2:].flatten()
        counted = (target != -100).float()
        total = 0.0
        if lm_weight:
            total = total + lm_weight * F.cross_entropy(logits, target, reduction="none")
        if teacher_weight:
            teacher = base_logits[:, i + 1:i + 1 + n].flatten(0, 1).float().softmax(-1)
            total = total + teacher_weight * F.cross_entropy(logits, teacher, reduction="none")
        return (total * counted).sum() / counted.sum().clamp(min=1)

    # checkpointed: the (B, T, V) logits of one head live at a time, and are computed again backward
    return torch.stack([checkpoint(loss, i, use_reentrant=False)
                        for i in range(heads.config.num_heads)])


@torch.no_grad()
def head_ranks(heads, hidden, embeddings, input_ids):
    """The rank each head gives the true token, given the true ones before: (B*(T-1-K), K).

    Shapes as in `head_losses`.  0 means that the head's best guess is right.
    """
    num_heads = heads.config.num_heads
    n = input_ids.shape[1] - 1 - num_heads
    ranks = []
    for i in range(num_heads):
        path = torch.stack([embeddings[:, j:j + n] for j in range(1, i + 2)], dim=-2)
        logits = heads(i, hidden[:, :n], path)
        true = logits.gather(-1, input_ids[:, i + 2:i + 2 + n, None])
        ranks.append((logits > true).sum(-1).flatten())
    return torch.stack(ranks, dim=-1)


def train_heads(model, heads, token_ids, *, steps, batch_size=8, seq_len=64, lr=1e-3,
                lm_weight=1.0, teacher_weight=0.0, labels=None, **schedule):
    """Train draft heads on a text; the base model stays as it is.

    token_ids (M,): one long text.  labels (M,): the same with -100 where no loss is wanted.
    schedule: as for `fit`.  Returns the history, a list of {"step", "loss", "top1"} with the
    share of right first guesses of each head.  Paper: 3, and 4 for teacher_weight.
    """
    @torch.no_grad()
    def read(ids):
        out = model(ids, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1], model.get_input_embeddings()(ids), out.logits

    def losses(ids, labels):
        hidden, embeddings, logits = read(ids)
        return head_losses(heads, heads.read_prefix(hidden), embeddings, ids, logits, labels,
                           lm_weight=lm_weight, teacher_weight=teacher_weight).sum()

    def report(ids):
        hidden, embeddings, _ = read(ids)
        ranks = head_ranks(heads, heads.read_prefix(hidden), embeddings, ids)
        return {"top1": [round(top1, 2) for top1 in (ranks == 0).float().mean(0).tolist()]}

    heads.train()
    history = fit(heads.parameters(), losses, report, token_ids, labels, steps=steps, lr=lr,
                  batch_size=batch_size, seq_len=seq_len, title="draft heads", **schedule)
    heads.eval()
    return history


def fit(parameters, losses, report, token_ids, labels, *, steps, batch_size, seq_len, lr, title,
        warmup=None, final_lr=0.33, weight_decay=0.1, clip=1.0, seed=0):
    """AdamW over random windows of a text: warm-up, cosine to final_lr * lr, clipped gradients."""
    if len(token_ids) <= seq_len:
        raise ValueError(f"the text has {len(token_ids)} tokens: more than seq_len={seq_len} needed")
    parameters = list(parameters)
    warmup = min(100, steps // 10 + 1) if warmup is None else warmup
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay,
                                  fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / max(warmup, 1),
        final_lr + (1 - final_lr) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2))
    device = parameters[0].device
    labels = token_ids if labels is None else labels
    chance, history = torch.Generator().manual_seed(seed), []
    bar = tqdm(range(steps), desc=title, unit="step", mininterval=0.5, disable=None)
    for step in bar:
        start = torch.randint(len(token_ids) - seq_len + 1, (batch_size, 1), generator=chance)
        window = start + torch.arange(seq_len)
        ids = token_ids[window].to(device)
        loss = losses(ids, labels[window].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            history.append({"step": step, "loss": loss.item(), **report(ids)})
            bar.set_postfix({k: v for k, v in history[-1].items() if k != "step"})
    return history


def search_tree(ranks, num_nodes):
    """The tree of num_nodes nodes that accepts most drafts, from counted ranks.

    ranks (M, K): at M positions of the base's own text, the rank that each head gives the true
    token.  A choice is accepted where the ranks start with it, so the num_nodes - 1 choices seen
    most often are the best tree; it is smaller where fewer were seen.  Paper: appendix (Medusa 2).

    >>> search_tree(torch.tensor([[0, 0], [0, 1], [0, 0], [1, 0]]), 4)
    [[0], [1], [0, 0]]
    """
    seen = Counter(tuple(row[:depth]) for row in ranks.tolist() for depth in range(1, len(row) + 1))
    best = sorted(seen, key=lambda choice: (-seen[choice], len(choice), choice))[:num_nodes - 1]
    return [list(choice) for choice in sorted(best, key=lambda choice: (len(choice), choice))]
