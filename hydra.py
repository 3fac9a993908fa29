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
L layers, H key-value heads, Dh their width. Draft heads are counted from 0: the base model at
position t predicts token t + 1, head i predicts token t + 2 + i.

Contents: 1 draft heads, 2 tree, 3 tree attention, 4 drafting, 5 acceptance, 6 KV cache, 7 decode
loop, 8 training, 9 models, 10 command line. Nothing needs a section below its own.
"""
import copy
import math
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache


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


def draft_head(width_in, base_lm_head, config):
    """One head: an MLP of `num_layers` blocks, then an lm_head of its own, a copy of the base's."""
    vocab, width = base_lm_head.weight.shape
    # subtle: all blocks after the first are one module, used several times over. The released
    # heads were trained so: "4 layers" is one conditioned block and one shared block, thrice.
    # Without conditioning the widths agree, and even the first block is that same module.
    first = ResBlock(width_in, width)
    shared = first if width_in == width else ResBlock(width, width)
    lm_head = nn.Linear(width, vocab)
    nn.init.zeros_(lm_head.bias)
    lm_head.load_state_dict(base_lm_head.state_dict(), strict=False)  # the base's may lack a bias
    layers = [first, *[shared] * (config.num_layers - 1), lm_head]
    return nn.Sequential(*(part for layer in layers
                           for part in (nn.Dropout(config.dropout), layer)))


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
            draft_head((i + 2) * width if config.grounded else width, base_lm_head, config)
            for i in range(config.num_heads))
        self.prefix_layer = make_prefix_layer(model) if config.prefix_layer else None
        self.to(model.device, model.dtype).eval()

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

# The tree that Medusa and Hydra were published with: for each expanded choice, how many of its
# best children are in the tree
MC_SIM_7B_63 = [[*parent, rank] for parent, count in {
    (): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1,
    (9,): 1, (0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1,
    (0, 7): 1, (1, 0): 2, (2, 0): 1, (0, 0, 0): 2}.items() for rank in range(count)]


@dataclass
class Tree:
    """A tree of N nodes, sorted by (depth, choice); node 0 is the root and its own parent.

    choices: the N - 1 choices as a list.  parents, depths, ranks (N,): each node's parent, its
    distance from the root, its rank among its parent's guesses.  paths (N, depth+1): the nodes
    from the root to each node, padded with that node.  mask (N, N): see section 3.
    levels: for section 4, derived from the rest; level d says how depth d grows into depth d + 1:
        paths (n, d+1)  of the n nodes that have children
        picks (m,)      where each of their m children finds its token among n * width guesses
        width           how many best guesses each of the n nodes has to make
    """
    choices: list
    parents: torch.Tensor
    depths: torch.Tensor
    ranks: torch.Tensor
    paths: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self):
        self.levels = []
        for depth in range(int(self.depths[-1])):
            children = (self.depths == depth + 1).nonzero()[:, 0]
            expanded, place = self.parents[children].unique(return_inverse=True)
            width = int(self.ranks[children].max()) + 1
            picks = place * width + self.ranks[children]
            self.levels.append((self.paths[expanded, :depth + 1], picks, width))

    @property
    def num_nodes(self):
        """N, the root included."""
        return len(self.choices) + 1

    def to(self, device):
        """The same tree with its tensors on another device."""
        moved = copy.copy(self)
        for name in ("parents", "depths", "ranks", "paths", "mask"):
            setattr(moved, name, getattr(self, name).to(device))
        moved.levels = [(paths.to(device), picks.to(device), width)
                        for paths, picks, width in self.levels]
        return moved


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
    require(isinstance(choices, (list, tuple)), f"choices must be lists of ranks, not {choices!r}")
    seen = set()
    for choice in choices:
        require(isinstance(choice, (list, tuple)) and len(choice) > 0
                and all(type(rank) is int and rank >= 0 for rank in choice),
                f"choice {choice!r} must be a non-empty list of ranks 0, 1, 2, ...")
        require(tuple(choice) not in seen, f"choice {choice!r} is there twice")
        seen.add(tuple(choice))
    for choice in choices:
        parent = list(choice[:-1])
        require(not parent or tuple(parent) in seen,
                f"choice {choice!r} has no parent: add {parent!r}")


def require(condition, message):
    """Raise ValueError: every bad input ends here, with one line that says what to do."""
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------- 3 tree attention

def tree_attention_mask(parents):
    """Which node may attend to which: ancestors and itself.

    parents (N,): each node's parent, parents before children, the root its own.  Returns
    (N, N) bool; row attends to column.  Siblings and cousins never see each other, so each path
    is computed as if it stood alone behind the prefix, and one forward verifies all of them.
    Paper: 2 (as in Medusa).

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


def mask_behind_prefix(mask, length, num_slots, dtype):
    """Where the tree sits in the cache: (B, 1, T, S), what each of T tokens may see of each slot.

    mask (T, T) bool; length (B,): committed slots of each row.  The tree occupies slots length ..
    length + T - 1: before it lies the prefix, which all see, behind it free slots, which none
    sees.  Additive, as attention takes it: 0, or the most negative number of dtype.
    """
    columns = F.pad(F.pad(mask, (1, 0), value=True), (0, 1), value=False)  # prefix | tree | free
    slots = torch.arange(num_slots, device=length.device)
    column = (slots - length[:, None] + 1).clamp(0, len(mask) + 1)         # (B, S)
    visible = columns[:, column].transpose(0, 1)[:, None]                  # (B, 1, T, S)
    return visible.new_zeros(visible.shape, dtype=dtype).masked_fill(
        ~visible, torch.finfo(dtype).min)


# ---------------------------------------------------------------------------------- 4 drafting

def draft_tree(heads, tree, root, hidden, embed):
    """Fill the tree with guesses, level by level, one head call per level.

    heads: DraftHeads.  tree: Tree.  root (B,): the token at node 0.  hidden (B, D): what the
    heads see of the position that predicted root.  embed: the base's input embedding.
    Returns tokens (B, N).  A child of rank r is the r-th best guess of its *own parent's* head
    call, which has read the tokens on that parent's path.  Paper: 3.
    """
    tokens = root[:, None]                                             # (B, 1)
    for depth, (paths, picks, width) in enumerate(tree.levels):
        logits = heads(depth, hidden[:, None], embed(tokens[:, paths]))  # (B, n, V)
        guesses = logits.topk(width).indices                           # (B, n, width), best first
        # Medusa's heads read no tokens: they make one row of guesses, which all n nodes share
        guesses = guesses.expand(-1, len(paths), -1).flatten(1)        # (B, n * width)
        tokens = torch.cat([tokens, guesses[:, picks]], dim=1)
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
    drafted = tree.depths > 0
    alive = (passes[:, None] | ~(tree.mask & drafted)).all(-1)         # (B, N) whole path passes
    depth = torch.where(alive, tree.depths, -1)
    longest = depth == depth.max(-1, keepdim=True).values
    if score is None:
        return longest.int().argmax(-1)
    path_score = torch.where(tree.mask & drafted, score[:, None], 0).sum(-1)
    return torch.where(longest, path_score, -torch.inf).argmax(-1)


def follow(wanted, tokens, tree):
    """Walk down the tree along the tokens that the base wants after each node, wanted (B, N)."""
    node = longest_accepted_path(tokens == wanted[:, tree.parents], tree)
    return node, wanted.gather(1, node[:, None])[:, 0]


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
    written behind it, at the slots in `slots` (B, T), and everything further is scratch.  Layers
    read the first `live` slots.  The prefix layer is simply one more layer.
    """

    def __init__(self, num_slots):
        super().__init__(layers=[])
        self.num_slots = self.live = num_slots
        self.slots = None
        self.kv = {}  # by layer: keys and values, each (B, H, S, Dh)

    def update(self, key, value, layer_idx, *_, **__):
        """Write key and value (B, H, T, Dh) at `slots`; return the live slots of that layer."""
        if layer_idx not in self.kv:  # heads, width, dtype and device are those that arrive
            self.kv[layer_idx] = [new.new_zeros(*new.shape[:2], self.num_slots, new.shape[3])
                                  for new in (key, value)]
        for stored, new in zip(self.kv[layer_idx], (key, value)):
            stored.scatter_(2, self.slots[:, None, :, None].expand_as(new), new)
        return tuple(stored[:, :, :self.live] for stored in self.kv[layer_idx])


def commit_path(kv, length, path):
    """Move the accepted path's rows to the end of the committed prefix, in place.

    kv (B, H, S, Dh): keys or values whose tree starts at slot length (B,).  path (B, depth+1):
    nodes from the root to the last accepted one, padded with it (what padding writes is scratch).

        prefix | sat  on  down  the  a  .  mat        path 0 1 4 -> slots 0 1 4 of the tree
        prefix   sat  on  a   | the  a  .  mat        length += 3, the rest is scratch
    """
    source = length[:, None] + path                                        # (B, depth+1)
    target = length[:, None] + torch.arange(path.shape[1], device=path.device)
    source, target = (slots[:, None, :, None].expand(-1, kv.shape[1], -1, kv.shape[3])
                      for slots in (source, target))
    kv.scatter_(2, target, kv.gather(2, source))


# ------------------------------------------------------------------------------- 7 decode loop

class Decoder:
    """The state of one decoding batch, and the step that advances it.

    model: the base.  heads: DraftHeads, or None with a one-node tree.  tree: Tree.  batch_size: B.
    max_context: tokens, prompt included, that a row may grow to.  accept: a function
    (tokens, logits, tree) -> (node, next_token) like `accept_greedy`.  cuda_graph: record the step
    once and replay it (None: where there is CUDA).  compile: pass it through torch.compile first.
    Raises ValueError when model, heads, tree and context do not fit each other.
    """

    def __init__(self, model, heads, tree, batch_size, max_context, accept=None, *,
                 cuda_graph=None, compile=False):
        check_fit(model, heads, tree, max_context)
        self.model, self.heads, self.tree = model, heads, tree.to(model.device)
        self.accept = accept or accept_greedy
        self.embed = model.get_input_embeddings()
        self.max_context = max_context
        self.cache = TreeCache(max_context + tree.num_nodes)
        self.rows = torch.arange(batch_size, device=model.device)
        self.length = torch.zeros_like(self.rows)       # (B,) committed tokens
        self.root = torch.zeros_like(self.rows)         # (B,) chosen, not yet committed
        self.active = torch.ones_like(self.rows)        # (B,) 0 once a row has finished
        self.hidden = torch.zeros(batch_size, self.embed.embedding_dim, dtype=model.dtype,
                                  device=model.device)  # (B, D) what the heads see
        self.longest = 0  # no row is longer: all that the host has to know of the lengths
        self.run = torch.compile(self.advance, fullgraph=True) if compile else self.advance
        on_cuda = model.device.type == "cuda"
        self.graphs = {} if on_cuda and cuda_graph is not False else None

    def prefill(self, input_ids, attention_mask=None):
        """Read the prompts up to their last token, which is the root of a first, plain step.

        input_ids (B, T), attention_mask (B, T): 0 marks padding, on either side.  Returns what
        `step` returns: each row's first token (B, 1), and ones (B,).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool().int()
        # padding moves to the right, so that every row starts at slot 0; what padding writes lies
        # behind the row's length and is overwritten
        order = mask.argsort(dim=1, descending=True, stable=True)
        tokens, length = input_ids.gather(1, order), mask.sum(1)
        self.longest = 0
        for chunk in tokens[:, :-1].split(512, dim=1):
            self.length.fill_(self.longest)
            self.look_at(chunk.shape[1])
            places = torch.arange(chunk.shape[1], device=chunk.device)
            self.read(chunk, places, places[:, None] >= places)
            self.longest += chunk.shape[1]
        self.length.copy_(length - 1)
        self.root.copy_(tokens.gather(1, length[:, None] - 1)[:, 0])
        self.active.fill_(1)
        self.look_at(1)
        self.longest += 1
        return self.advance(build_tree([]).to(tokens.device))

    def step(self):
        """One decode step: returns tokens (B, depth+1), and counts (B,), how many of them count.

        Fixed shapes, state updated in place, nothing read by the host.
        """
        self.look_at(self.tree.num_nodes)
        self.longest += self.tree.paths.shape[1]
        if self.graphs is None:
            return self.run(self.tree)
        if self.cache.live not in self.graphs:
            self.graphs[self.cache.live] = self.capture()
        graph, emitted = self.graphs[self.cache.live]
        graph.replay()
        return emitted

    def look_at(self, num_tokens):
        """Let attention read only as many slots as it must: a power of two, so few sizes occur."""
        used = self.longest + num_tokens
        self.cache.live = min(self.cache.num_slots, max(256, 1 << (used - 1).bit_length()))

    def capture(self):
        """Record one step as a CUDA graph; the runs that warm it up leave the state as it was."""
        state = self.length, self.root, self.hidden
        saved = [tensor.clone() for tensor in state]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                self.run(self.tree)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            emitted = self.run(self.tree)
        for tensor, value in zip(state, saved):
            tensor.copy_(value)
        return graph, emitted

    def advance(self, tree):
        """Draft, verify, accept, commit."""
        tokens = draft_tree(self.heads, tree, self.root, self.hidden, self.embed)
        logits, hidden = self.read(tokens, tree.depths, tree.mask)
        return self.commit(tokens, logits, hidden, tree)

    def read(self, tokens, depths, mask):
        """Run base model and prefix layer over tokens (B, T) behind each row's prefix.

        depths (T,), mask (T, T): how the tokens hang together, as a tree or as a chain.  Returns
        the base's logits (B, T, V) and what the heads see (B, T, D).
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        self.cache.slots = self.length[:, None] + places
        where = dict(
            attention_mask=mask_behind_prefix(mask, self.length, self.cache.live, self.model.dtype),
            position_ids=(self.length[:, None] + depths).clamp(max=self.max_context - 1),
            past_key_values=self.cache, use_cache=True)
        out = self.model(input_ids=tokens, output_hidden_states=True, **where)
        hidden = out.hidden_states[-1]  # after the final norm
        return out.logits, self.heads.read_prefix(hidden, **where) if self.heads else hidden

    def commit(self, tokens, logits, hidden, tree):
        """Accept a path and keep its keys and values; the bonus token is the next root."""
        node, bonus = self.accept(tokens, logits, tree)
        path, accepted = tree.paths[node], tree.depths[node]            # (B, depth+1), (B,)
        for keys, values in self.cache.kv.values():
            commit_path(keys, self.length, path)
            commit_path(values, self.length, path)
        self.length.add_((accepted + 1) * self.active).clamp_(max=self.max_context)
        self.root.copy_(bonus)
        self.hidden.copy_(hidden[self.rows, node])
        # what the step emits: the path below the root, then the bonus token
        emitted = tokens.gather(1, path).roll(-1, dims=1)
        return emitted.scatter(1, accepted[:, None], bonus[:, None]), accepted + 1


def check_fit(model, heads, tree, max_context):
    """Raise ValueError when the tree asks for more than heads and vocabulary have, and the like."""
    num_heads, depth = heads.config.num_heads if heads else 0, tree.paths.shape[1] - 1
    base = tuple(model.get_output_embeddings().weight.shape)
    own = tuple(heads.heads[0][-1].weight.shape) if heads else base
    require(own == base, f"the heads are made for V, D = {own}, but the base has {base}")
    require(depth <= num_heads, f"choice {tree.choices[-1:]} is {depth} deep but there are "
            f"{num_heads} draft heads: cut the tree or train more heads")
    widest = max(tree.choices, key=lambda choice: choice[-1], default=[0])
    require(widest[-1] < base[0], f"choice {widest} asks for rank {widest[-1]} of {base[0]} tokens")
    limit = getattr(model.config, "max_position_embeddings", None) or max_context
    require(0 < max_context <= limit,
            f"max_context must lie between 1 and the model's {limit}, not at {max_context}")


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
        return sum(map(sum, self.emitted)) / max(sum(map(len, self.emitted)), 1)


@torch.inference_mode()
def generate(model, heads, input_ids, *, tree=None, accept="greedy", temperature=1.0, epsilon=0.09,
             delta=0.3, max_new_tokens=128, eos_token_id=None, pad_token_id=None,
             attention_mask=None, streamer=None, max_context=None, cuda_graph=None, compile=False):
    """Decode with draft heads; greedy and sampling give what plain decoding gives.

    input_ids (B, T), padded on either side under attention_mask (B, T).  tree: a Tree, a list of
    choices, or None for the heads' own, else MC_SIM_7B_63 as far as it fits.  accept: "greedy",
    "typical" or "sampling"; temperature 0 is greedy.  eos_token_id: one id, several, or None.
    Each row stops exactly at EOS, after max_new_tokens, or when it holds max_context tokens
    (default: as many as asked for, up to the model's longest).  streamer: a transformers streamer,
    for B = 1; it gets the prompt, then each step's tokens.  cuda_graph, compile: see Decoder.
    Returns an Output.  Raises ValueError on bad arguments.
    """
    if not isinstance(tree, Tree):
        tree = build_tree(default_choices(heads, model) if tree is None else tree)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool()
    lengths = mask.sum(1).tolist()
    longest, limit = max(lengths, default=0), getattr(model.config, "max_position_embeddings", None)
    max_context = max_context or min(limit or sys.maxsize, longest + max_new_tokens)
    require(min(lengths, default=0) > 0, "the prompt is empty: give at least one token")
    require(longest <= max_context, f"the prompt has {longest} tokens but the context holds "
            f"{max_context}: shorten it")
    require(max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    require(not streamer or len(lengths) == 1, "a streamer shows one row: pass a single prompt")
    decoder = Decoder(model, heads, tree, len(lengths), max_context,
                      choose_acceptance(accept, temperature, epsilon, delta),
                      cuda_graph=cuda_graph, compile=compile)
    eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    room = [min(max_new_tokens, max_context - length) for length in lengths]
    new, emitted = [[] for _ in lengths], [[] for _ in lengths]
    running = [row for row, tokens in enumerate(room) if tokens]

    if streamer:
        streamer.put(input_ids.cpu())
    result = decoder.prefill(input_ids, mask) if running else None
    start = time.perf_counter()
    while running:
        tokens, counts = (tensor.tolist() for tensor in result)  # the host's one look at a step
        for row in running:
            emitted[row].append(counts[row])
            fresh = tokens[row][:min(counts[row], room[row] - len(new[row]))]
            stop = next((place for place, token in enumerate(fresh) if token in eos), len(fresh))
            new[row] += fresh[:stop + 1]
            if streamer:
                streamer.put(torch.tensor(fresh[:stop + 1]))
            if stop < len(fresh) or len(new[row]) == room[row]:
                decoder.active[row] = 0
        running = [row for row in running if len(new[row]) < room[row] and new[row][-1] not in eos]
        decoder.longest = longest + max(map(len, new))
        if running:
            result = decoder.step()
    seconds = time.perf_counter() - start
    if streamer:
        streamer.end()

    pad = pad_token_id if pad_token_id is not None else min(eos, default=0)
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in new], True, pad)
    return Output(torch.cat([input_ids, padded.to(input_ids)], dim=1),
                  [steps[1:] for steps in emitted], seconds)


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
    """The acceptance function of that name, its settings filled in."""
    require(0 <= temperature < math.inf, f"temperature must be 0 or more, not {temperature}")
    require(0 < epsilon <= 1 and 0 < delta <= 1,
            f"epsilon and delta must lie in (0, 1], not at {epsilon} and {delta}")
    rules = dict(greedy=accept_greedy, sampling=partial(accept_sampling, temperature=temperature),
                 typical=partial(accept_typical, temperature=temperature, epsilon=epsilon,
                                 delta=delta))
    require(name in rules, f"accept must be one of {', '.join(rules)}, not {name!r}")
    return accept_greedy if temperature == 0 else rules[name]


