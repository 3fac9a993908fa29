# SPDX-License-Identifier: MIT
r"""Hydra: sequentially dependent draft heads for Medusa decoding (arXiv 2402.05109), in one file.

A language model reads all of its weights to write one token, and reading them for one token or
for a few dozen takes about the same time. So Hydra guesses a small *tree* of continuations with
cheap draft heads, verifies the whole tree in one forward pass of the base model, and keeps the
longest path that the base model agrees with. Every decode step does the same:

    length = number of committed tokens, whose keys and values are in the cache
    root   = the token that the base model has chosen but not yet read
    hidden = the base model's last hidden state, the one that predicted root
    repeat:
        1 draft    tokens of the tree below root: for each node of depth i, head i reads hidden
                   and the i+1 tokens on the path to it; its best guesses are the node's children
        2 verify   one forward of the base model over all N nodes; a node sees the committed
                   prefix, its ancestors and itself (the tree attention mask), nothing else
        3 accept   the longest path whose every token is what the base model wanted there;
                   the base model's next token after that path is a free extra, the bonus token
        4 commit   the accepted path's keys and values move up behind the prefix; root = bonus
                   token; length += accepted drafts + 1; hidden = state at the last accepted node

Medusa's head i sees hidden alone: it must guess the token at distance i + 2 without knowing which
tokens stand in between. That one difference is `head_input` below, and it is the paper's idea.

The running example is this tree of seven nodes. Node 0, the root, is always right; every other
node is named by its *choice*, the path of child ranks that leads to it:

                  0 "sat"                       node  choice     parent  depth  rank
                 /       \                       1    [0]           0      1     0
            1 "on"       2 "down"                2    [1]           0      1     1
            /    \            \                  3    [0, 0]        1      2     0
      3 "the"    4 "a"       5 "."               4    [0, 1]        1      2     1
         |                                       5    [1, 0]        2      2     0
      6 "mat"                                    6    [0, 0, 0]     3      3     0

One idea keeps the file small: a step reads nothing back to the host, and its shapes depend on no
token. A tree always has N nodes, a path is depth + 1 nodes (padded with its last node), and every
row carries its own length as a tensor. Batches in which each row accepts another number of tokens,
CUDA graphs and torch.compile all follow from that choice. Only the slots read grow: 512, 1024, ...

Shapes: B batch, N tree nodes, K draft heads, D hidden size, V vocabulary, T tokens, S cache slots,
L layers, H key-value heads, Dh their width. Draft heads are counted from 0: the base model at
position t predicts token t + 1, head i token t + 2 + i. Sections 8 to 10 train, load and run it.
"""
import copy, inspect, math, time, warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
import torch, transformers
import torch.nn.functional as F
from torch import nn
# ------------------------------------------------------------------------------ 1 draft heads
@dataclass
class HydraConfig:
    """Which draft heads to build; section 8's KINDS says how Medusa, Hydra and Hydra++ differ."""
    num_heads: int = 4          # K, how many tokens below the root can be guessed
    num_layers: int = 1         # blocks in a head's MLP, all but the first shared; Hydra++ has 4
    grounded: bool = True       # True is Hydra; False is Medusa, whose heads see no tokens
    prefix_layer: bool = False  # Hydra++: one more decoder layer over the base's hidden states
    dropout: float = 0.0        # needs prefix_layer; before every block and every lm_head

def head_input(hidden, embeddings):
    """The paper's idea in one line: a head sees the hidden state *and* the tokens guessed so far.

    hidden (..., D): the base's state h[t], or Hydra++'s p[t].  embeddings (..., i+1, D): the
    base's input embeddings of tokens t+1 .. t+1+i, oldest first.  Returns (..., (i+2)*D), in that
    order.  Training and drafting both call it.  Paper: 3.

    >>> head_input(torch.tensor([1., 2.]), torch.tensor([[3., 4.], [5., 6.]]))
    tensor([1., 2., 3., 4., 5., 6.])
    """
    return torch.cat([hidden, embeddings.flatten(-2)], dim=-1)

class ResBlock(nn.Module):
    """y = R(x) + SiLU(W x + b), W zero at first; R projects (i+2)*D to D, or is the identity."""
    def __init__(self, wide, width):
        super().__init__()
        self.linear = nn.Linear(wide, width)
        nn.init.zeros_(self.linear.weight)
        self.res_connection = nn.Identity() if wide == width else nn.Linear(wide, width)
    def forward(self, x):
        return self.res_connection(x) + F.silu(self.linear(x))

class DraftHeads(nn.Module):
    """K draft heads for one base model, and the prefix layer if there is one.

    model: any decoder-only causal language model of transformers; the heads take its widths, dtype
    and device, start from its lm_head, and keep no reference to it.  Paper: 3, and 4 (Hydra++).
    """
    def __init__(self, config, model):
        super().__init__()
        self.config, self.base_name = config, model.config.name_or_path
        self.choices = None  # of the fastest tree, where section 8 has searched one
        self.hydra_mlp, self.hydra_lm_head = nn.ModuleList(), nn.ModuleList()  # released names
        self.shape = vocab, width = tuple(model.get_output_embeddings().weight.shape)  # V, D
        for i in range(config.num_heads):
            # subtle: all blocks after the first are one module, used again and again; without
            # grounding even the first is that module. The released heads were trained so.
            first = ResBlock((i + 2) * width if config.grounded else width, width)
            shared = ResBlock(width, width) if config.grounded else first
            blocks = [first] + [shared] * (config.num_layers - 1)
            lm_head = nn.Linear(width, vocab)
            nn.init.zeros_(lm_head.bias)
            for own, base in zip(lm_head.parameters(), model.get_output_embeddings().parameters()):
                own.data.copy_(whole(base))
            drop = [nn.Dropout(config.dropout)] if config.prefix_layer else []  # as released
            self.hydra_mlp.append(nn.Sequential(*(m for block in blocks for m in (*drop, block))))
            self.hydra_lm_head.append(nn.Sequential(*drop, lm_head) if drop else lm_head)
        self.prefix_embeding_layer = make_prefix_layer(model) if config.prefix_layer else None
        self.usual_choices = [choice for choice in MC_SIM_7B_63  # section 2's, as far as it fits
                              if len(choice) <= config.num_heads and max(choice) < vocab]
        set_dtype(self.eval(), model.dtype)
        self.to(model.device)

    def forward(self, i, hidden, embeddings):
        """Logits of head i: hidden (..., D) broadcasts to embeddings (..., i+1, D) -> (..., V)."""
        if self.config.grounded:
            hidden = head_input(hidden.expand(*embeddings.shape[:-2], -1), embeddings)
        return self.hydra_lm_head[i](self.hydra_mlp[i](hidden))

    def read_prefix(self, hidden, **where):
        """What the heads see in place of hidden (B, T, D); where: mask, positions, cache."""
        layer = self.prefix_embeding_layer
        return layer(inputs_embeds=hidden, **where).last_hidden_state if layer else hidden

def whole(weight):
    """A weight of the base, put together from its shards where several GPUs share the base."""
    return getattr(weight, "full_tensor", weight.detach)()

def set_dtype(module, dtype):
    """Change the dtype of the weights, but not of buffers: RoPE's frequencies stay in fp32."""
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)

def make_prefix_layer(model):
    """Hydra++'s prefix layer: a decoder of the base's own architecture with a single layer.

    It reads the base's final hidden states in place of embeddings: p[t] attends to h[0..t].  In
    the KV cache it is one more layer behind the base's.  Paper: 4 (Hydra++).
    """
    config = copy.deepcopy(model.config.get_text_config())
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    behind, config.num_hidden_layers, config.use_cache = config.num_hidden_layers, 1, False
    layer = transformers.AutoModel.from_config(config)
    layer.set_input_embeddings(None)  # never used: it is fed hidden states
    for module in layer.modules():
        for name in {"layer_idx", "layer_id"} & vars(module).keys():
            setattr(module, name, behind)  # 0 is the base's own layer
    return layer
# -------------------------------------------------------------------------------------- 2 tree
# The tree of the released code: for each expanded choice, how many of its best children are in it
MC_SIM_7B_63 = [[*parent, rank] for parent, count in {
    (): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1,
    (9,): 1, (0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1,
    (0, 7): 1, (1, 0): 2, (2, 0): 1, (0, 0, 0): 2}.items() for rank in range(count)]

@dataclass(eq=False)
class Tree:
    """A tree of N nodes, sorted by (depth, choice); node 0 is the root and its own parent.

    levels, for section 4, by depth d: (paths (n, d+1) of the n nodes that have children; for each
    of their m children, its parent's row in these paths (m,); and its rank (m,)).
    """
    choices: list          # the N - 1 choices
    parents: torch.Tensor  # (N,) each node's parent
    depths: torch.Tensor   # (N,) its distance from the root
    ranks: torch.Tensor    # (N,) its rank among its parent's guesses
    paths: torch.Tensor    # (N, depth+1) the nodes from the root to it, padded with itself
    mask: torch.Tensor     # (N, N) bool, the tree attention mask of section 3

    def __post_init__(self):
        self.num_nodes, self.levels = len(self.parents), []
        self.width = int(self.ranks.max()) + 1  # how many guesses a node has to make
        for depth in range(int(self.depths[-1])):
            children = (self.depths == depth + 1).nonzero()[:, 0]
            expanded, place = self.parents[children].unique(return_inverse=True)
            self.levels.append((self.paths[expanded, :depth + 1], place, self.ranks[children]))

    def to(self, device):
        """The same tree with its tensors on another device."""
        moved = copy.copy(self)
        for name in ("parents", "depths", "ranks", "paths", "mask"):
            setattr(moved, name, getattr(self, name).to(device))
        moved.levels = [[part.to(device) for part in level] for level in self.levels]
        return moved

def build_tree(choices):
    """From a list of choices to a Tree.

    choices: lists of child ranks, in any order; `[0, 2]` is the third-best child of the best child
    of the root.  Ranks may have gaps and any node may be expanded, but a choice's parent must be a
    choice too.  No choices: the one-node tree.  ValueError names a malformed choice.  Paper: 2.

    >>> tree = build_tree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    >>> tree.parents.tolist(), tree.depths.tolist(), tree.ranks.tolist()
    ([0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 0, 1, 0, 0])
    >>> tree.paths[4].tolist(), tree.paths[6].tolist()
    ([0, 1, 4, 4], [0, 1, 3, 6])
    """
    for choice in choices if isinstance(choices, (list, tuple)) else [choices]:
        require(isinstance(choice, (list, tuple)) and len(choice) > 0
                and all(type(rank) is int and rank >= 0 for rank in choice),
                f"choice {choice!r} must be a list of ranks 0, 1, 2, ...")
    choices = sorted(map(list, choices), key=lambda choice: (len(choice), choice))
    node_of, parents, ranks, paths = {(): 0}, [0], [0], [[0]]
    for node, choice in enumerate(choices, start=1):
        parent = tuple(choice[:-1])
        require(parent in node_of, f"choice {choice} has no parent: add {list(parent)}")
        require(tuple(choice) not in node_of, f"choice {choice} is there twice")
        node_of[tuple(choice)] = node
        parents.append(node_of[parent])
        ranks.append(choice[-1])
        paths.append([*paths[node_of[parent]], node])
    depths = [len(path) - 1 for path in paths]
    paths = [path + path[-1:] * (depths[-1] + 1 - len(path)) for path in paths]  # equally long
    parents, depths, ranks, paths = map(torch.tensor, (parents, depths, ranks, paths))
    return Tree(choices, parents, depths, ranks, paths, tree_attention_mask(parents))  # see 3

def require(condition, message):
    """Raise ValueError: every bad input ends here, with one line that says what to do."""
    if not condition:
        raise ValueError(message)
# ---------------------------------------------------------------------------- 3 tree attention
def tree_attention_mask(parents):
    """Which node may attend to which: ancestors and itself.

    parents (N,): each node's parent, parents before children, the root its own.  Returns (N, N)
    bool; row attends to column.  Siblings and cousins never see each other: each path is computed
    as if it stood alone behind the prefix, and one forward verifies all of them.  Paper: 2.

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

    mask (T, T) bool; length (B,): committed slots.  The tree lies at length .. length + T - 1; all
    see the prefix before it, none the free slots.  Additive: 0, or dtype's most negative number.
    """
    sights = F.pad(F.pad(mask, (1, 0), value=True), (0, 1))  # (T, T + 2) of prefix, tree, free
    slots = torch.arange(num_slots, device=length.device)
    kinds = (slots - length[:, None] + 1).clamp(0, len(mask) + 1)  # (B, S) a column of sights
    visible = sights[:, kinds].transpose(0, 1)[:, None]                    # (B, 1, T, S)
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
# ---------------------------------------------------------------------------------- 4 drafting
def draft_tree(heads, tree, root, hidden, embed):
    """Fill the tree with guesses, level by level, one head call per level.

    heads: DraftHeads, or None if the tree is its root alone.  root (B,): the token at node 0.
    hidden (B, D): what the heads see of the position that predicted root.  embed: the base's input
    embedding.  Returns tokens (B, N).  A child of rank r (0 is the best) is a guess of its *own
    parent's* head call, which has read the tokens on that parent's path.  Paper: 3.
    """
    tokens = root[:, None]                                             # (B, 1)
    for depth, (paths, place, rank) in enumerate(tree.levels):
        logits = heads(depth, hidden[:, None], embed(tokens[:, paths]))  # (B, n or 1, V)
        guesses = logits.topk(tree.width).indices                      # (B, n or 1, width)
        # Medusa's heads read no tokens: they make one row of guesses, which all n nodes share
        guesses = guesses.expand(-1, len(paths), -1)                   # (B, n, width), best first
        tokens = torch.cat([tokens, guesses[:, place, rank]], dim=1)   # (B, nodes so far)
    return tokens
# -------------------------------------------------------------------------------- 5 acceptance
def longest_accepted_path(passes, tree, score=None):
    """The deepest node that passes together with all of its ancestors.

    passes (B, N) bool: does the node's token agree with the base model?  The root's is ignored.
    score (B, N): each node's own contribution; among paths of equal depth the one with the
    largest sum wins, and without a score the first in node order.  Returns node (B,).

    >>> tree = build_tree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    >>> longest_accepted_path(torch.tensor([[1, 1, 0, 0, 1, 1, 1]]).bool(), tree)  # 3 breaks 6
    tensor([4])
    """
    passes = passes | (tree.depths == 0)
    alive = passes[:, tree.paths].all(-1)                              # (B, N) whole path passes
    depth = torch.where(alive, tree.depths, -1)
    longest = depth == depth.max(-1, keepdim=True).values
    if score is None:
        return longest.int().argmax(-1)
    path_score = torch.where(tree.mask & (tree.depths > 0), score[:, None], 0).sum(-1)
    return torch.where(longest, path_score, -torch.inf).argmax(-1)

def accept_greedy(tokens, logits, tree):
    """Accept what plain greedy decoding would have written: a token passes when it is the argmax.

    tokens (B, N), logits (B, N, V): the base's logits at every node.  Returns node (B,), the last
    accepted one, and next_token (B,), the base's own choice after it.  Paper: 2.
    """
    wanted = logits.argmax(-1)                                         # (B, N)
    node = longest_accepted_path(tokens == wanted[:, tree.parents], tree)
    return node, wanted.gather(1, node[:, None])[:, 0]

def accept_sampling(tokens, logits, tree, temperature):
    """Exact sampling (not in the paper): draw the base's token at each node, follow the draws.

    Shapes as in `accept_greedy`.  A child passes when it is what its parent drew, so whatever was
    drafted, each emitted token is a draw from softmax(logits / temperature): the output has
    exactly the distribution of plain sampling.  Siblings must hold distinct tokens (top-k does).
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    # subtle: argmax of p / e with e ~ Exponential(1) is a draw from p, without asking the host
    return accept_greedy(tokens, probs / torch.empty_like(probs).exponential_(), tree)

def accept_typical(tokens, logits, tree, temperature, epsilon=0.09, delta=0.3):
    """Typical acceptance: a token passes when it is likely enough, so text may leave plain greedy.

        p(token | its path) > min(epsilon, delta * exp(-H)),    H the entropy of p

    Where the base is unsure (H large) even improbable tokens pass.  Shapes as in `accept_greedy`; p
    is the softmax of the parent's logits / temperature.  Among longest paths the likeliest wins.
    The bonus token is the argmax: nothing is drawn.  Paper: 2 (as in Medusa).
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)        # (B, N, V)
    entropy = -(probs * torch.log(probs + 1e-5)).sum(-1)
    threshold = (delta * torch.exp(-entropy)).clamp(max=epsilon)       # (B, N)
    token_probs = probs[:, tree.parents].gather(2, tokens[:, :, None])[:, :, 0]  # (B, N)
    node = longest_accepted_path(token_probs > threshold[:, tree.parents], tree, token_probs.log())
    return node, logits.argmax(-1).gather(1, node[:, None])[:, 0]
# ---------------------------------------------------------------------------------- 6 KV cache
class TreeCache(transformers.Cache):
    """Keys and values of S slots for each layer and row; transformers' layers write into it.

    A row's first `length` slots are its committed prefix.  A forward pass writes its tokens behind
    it, at `slots` (B, T), and reads the first `live` slots: all running rows' prefixes and trees.
    `together` layers share a tensor of keys, one of values (layer behind layer): fast to commit.
    """
    def __init__(self, together, num_slots):
        super().__init__(layers=[])
        self.together, self.num_slots, self.live = together, num_slots, num_slots
        self.kv = {}  # (layer // together, 0 keys or 1 values, ...): (together * B, H, S, Dh)
    def update(self, key, value, layer_idx, *_, **__):
        """Write key and value (B, H, T, Dh) into their slots; return that layer's live ones."""
        group, first = layer_idx // self.together, layer_idx % self.together * len(key)
        rows, views = torch.arange(first, first + len(key), device=key.device)[:, None], []
        for which, new in enumerate((key, value)):
            shape = self.together * len(new), new.shape[1], self.num_slots, new.shape[3]
            if (name := (group, which, shape, new.dtype)) not in self.kv:
                self.kv[name] = new.new_zeros(shape)
            self.kv[name][rows, :, self.slots] = new.transpose(1, 2)
            views.append(self.kv[name][first:first + len(new), :, :self.live])
        return views

def commit_path(kv, length, path):
    """Move the accepted path's keys or values to the end of the committed prefix, in place.

    kv (B, H, S, Dh): keys or values whose tree starts at slot length (B,).  path (B, depth+1):
    nodes from the root to the last accepted one, padded with it (what padding writes is scratch).

        prefix | sat  on  down  the  a  .  mat        nodes 0 1 4 4 go to slots 0 1 2 3
        prefix   sat  on  a   | a    a  .  mat        then length += 3: the rest is scratch
    """
    rows = torch.arange(len(path), device=path.device)[:, None]            # (B, 1)
    source = length[:, None] + path                                        # (B, depth+1)
    target = length[:, None] + torch.arange(path.shape[1], device=path.device)
    kv[rows, :, target] = kv[rows, :, source]  # (B, depth+1, H, Dh), read before written
# ------------------------------------------------------------------------------- 7 decode loop
class Decoder:
    """The state of one decoding batch, and the step that advances it.

    model: the base.  heads: DraftHeads, or None with a one-node tree.  max_context: tokens, prompt
    included, that a row may grow to.  accept: (tokens, logits, tree) -> (node, next_token).
    cuda_graph: replay a recorded step (None: on CUDA).  compile: torch.compile.  Raises ValueError.
    """
    def __init__(self, model, heads, tree, batch_size, max_context, accept=None, *,
                 cuda_graph=None, compile=False):
        check_fit(model, heads, tree, max_context)
        self.model, self.heads, self.max_context, self.graphs = model, heads, max_context, {}
        self.tree, self.embed = tree.to(model.device), model.get_input_embeddings()
        extra = bool(heads and heads.config.prefix_layer)  # below, 1: tuning copies whole tensors
        self.together = 1 if compile else model.config.get_text_config().num_hidden_layers + extra
        self.cache = TreeCache(self.together, max_context + tree.num_nodes)
        self.length = torch.zeros(batch_size, dtype=torch.long, device=model.device)  # committed
        self.root = torch.zeros_like(self.length)  # (B,) not yet committed; hidden: what heads see
        self.hidden = self.length.new_zeros(batch_size, self.embed.embedding_dim, dtype=model.dtype)
        self.cuda_graph = model.device.type == "cuda" if cuda_graph is None else cuda_graph
        self.accept, self.run = accept or accept_greedy, Decoder.advance  # unbound, so no cycle
        if compile:
            torch.compiler.reset()  # earlier ones would count towards a limit of eight compilations
            self.run = torch.compile(Decoder.advance, fullgraph=True, dynamic=False, options={
                "coordinate_descent_tuning": tree.num_nodes == 1})  # pays for single tokens only

    @torch.inference_mode()
    def prefill(self, input_ids, attention_mask=None):
        """Read the prompts; then their last token once more, as root of a first, plain step.

        input_ids, attention_mask (B, T): 0 pads, on either side.  Returns as `step`: tokens (B, 1).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool().int()
        # padding moves behind its row; nobody reads it there (`read` keeps it within the cache)
        order = mask.argsort(dim=1, descending=True, stable=True)
        tokens, length = input_ids.gather(1, order), mask.sum(1)
        self.longest, self.cache.live = tokens.shape[1], self.cache.num_slots  # bounds all lengths
        for piece, chunk in enumerate(tokens.split(512, dim=1)):  # pieces, so that masks stay small
            places = torch.arange(chunk.shape[1], device=chunk.device)
            self.length.fill_(512 * piece)
            self.read(chunk, places, places[:, None] >= places)
        self.length.copy_(length - 1)
        if self.cuda_graph or self.run is not Decoder.advance:
            self.step()  # on scratch: compiles and records, if that is still to be done
            self.length.copy_(length - 1)
        self.root.copy_(tokens.gather(1, length[:, None] - 1)[:, 0])
        return self.advance(build_tree([]).to(tokens.device))

    @torch.inference_mode()
    def step(self):
        """Returns tokens (B, depth+1) and counts (B,), how many are new; a graph reuses both."""
        needed = self.longest + self.tree.num_nodes  # slots; attention reads 512, 1024, ..., or all
        live = self.cache.live = min(max(512, 1 << (needed - 1).bit_length()), self.cache.num_slots)
        self.longest += self.tree.paths.shape[1]
        if live in self.graphs:
            self.graphs[live].replay()
            return self.graphs[live].result
        result = self.run(self, self.tree)  # the first of its kind: a graph's warm-up
        if self.cuda_graph:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):  # records the same step again, without running it
                    graph.result = self.run(self, self.tree)
                self.graphs[live] = graph
            except RuntimeError as error:  # a base that asks the host, say
                warnings.warn(f"no CUDA graph, so steps are slow: {error}")
                self.cuda_graph = False
                for chance in torch.cuda.default_generators:  # else they stay in capture mode
                    chance.graphsafe_set_state(chance.clone_state().graphsafe_get_state())
        return result

    def advance(self, tree):
        """Draft, verify, accept and commit."""
        tokens = draft_tree(self.heads, tree, self.root, self.hidden, self.embed)
        return self.commit(tokens, *self.read(tokens, tree.depths, tree.mask), tree)

    def read(self, tokens, depths, mask):
        """Run base model and prefix layer over tokens (B, T) behind each row's prefix.

        depths (T,), mask (T, T): a tree's or chain's.  Returns logits (B, T, V), hidden (B, T, D).
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        self.cache.slots = (self.length[:, None] + places).clamp(max=self.cache.num_slots - 1)
        mask = mask_behind_prefix(mask, self.length, self.cache.live, self.model.dtype)
        positions = (self.length[:, None] + depths).clamp(max=self.max_context - 1)
        where = dict(attention_mask=mask, position_ids=positions, past_key_values=self.cache,
                     use_cache=True)
        out = self.model(input_ids=tokens, output_hidden_states=True, **where)
        hidden = out.hidden_states[-1]  # after the final norm
        return out.logits, self.heads.read_prefix(hidden, **where) if self.heads else hidden

    def commit(self, tokens, logits, hidden, tree):
        """Accept a path and keep its keys and values; the bonus token is the next root."""
        node, bonus = self.accept(tokens, logits, tree)
        path, accepted = tree.paths[node], tree.depths[node]            # (B, depth+1), (B,)
        for kv in self.cache.kv.values() if tree.choices else []:  # a lone root stays where it is
            commit_path(kv, self.length.repeat(self.together), path.repeat(self.together, 1))
        self.length.add_(accepted + 1).clamp_(max=self.max_context)  # finished rows run on
        self.root.copy_(bonus)
        self.hidden.copy_(hidden.take_along_dim(node[:, None, None], dim=1)[:, 0])
        # root d1 d2 d2 -> d1 d2 d2 root; the bonus token goes in behind the accepted drafts
        emitted = tokens.gather(1, path).roll(-1, dims=1)
        return emitted.scatter(1, accepted[:, None], bonus[:, None]), accepted + 1

def check_fit(model, heads, tree, max_context):
    """Raise ValueError if the tree is too much for heads or vocabulary, or for the base."""
    config, depth = model.config.get_text_config(), tree.paths.shape[1] - 1
    base = tuple(model.get_output_embeddings().weight.shape)
    own, num_heads = (heads.shape, heads.config.num_heads) if heads else (base, 0)
    require(own == base, f"the heads are made for V, D = {own}, but the base has {base}")
    require(depth <= num_heads, f"the tree is {depth} deep but there are {num_heads} draft heads")
    windows = [getattr(config, name, None) for name in
        "sliding_window attention_chunk_size window_size floor_scale keep_window_size".split()]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # its frequencies change there
        windows.append(rope["original_max_position_embeddings"])
    window = min(filter(None, windows), default=math.inf)
    require(max_context + tree.num_nodes <= window, f"context and tree exceed a window of {window}")
    odd = [what for what in ("alibi", "is_encoder_decoder", "_is_stateful", "num_random_blocks",
           "index_topk") if any(getattr(part, what, 0) for part in (model, model.config, config))]
    odd += {"linear_attention", "conv", "mamba"} & {*(getattr(config, "layer_types", None) or ())}
    odd += [name for name in [config._attn_implementation] if name not in ("sdpa", "eager")]
    odd += {"position_ids", "past_key_values"} - {*inspect.signature(model.forward).parameters}
    require(not odd, f"{config.model_type} cannot read a tree, for what it has or lacks: {odd}")
    require(tree.width <= base[0], f"the tree asks for rank {tree.width - 1} of {base[0]} tokens")
    limit = getattr(config, "max_position_embeddings", None) or max_context
    require(0 < max_context <= limit, f"max_context must lie in 1 .. {limit}, not at {max_context}")

def choose_acceptance(name, temperature, epsilon, delta):
    """The acceptance function of that name, its settings filled in."""
    require(temperature == 0 or 1e-5 <= temperature < 1e5, f"{temperature=} must be 0 or 1e-5..1e5")
    require(0 < epsilon <= 1 and 0 < delta <= 1, f"{epsilon=} and {delta=} must lie in (0, 1]")
    rules = {"greedy": accept_greedy, "sampling": partial(accept_sampling, temperature=temperature),
             "typical": partial(accept_typical, temperature=temperature, epsilon=epsilon,
                                delta=delta)}
    require(name in rules, f"accept must be one of {', '.join(rules)}, not {name!r}")
    return accept_greedy if temperature == 0 else rules[name]

@dataclass
class Output:
    """What `generate` returns."""
    sequences: torch.Tensor  # (B, T') the prompt as given, new tokens from column T on, padding
    tree: Tree               # what was drafted
    emitted: list            # by row, for each step after prefill: accepted drafts + 1, uncut
    new_tokens: list         # for each row its new tokens, without padding
    seconds: float           # of all steps, prefill left out, graphs recorded later included
    cache_bytes: int = 0     # of keys and values
    @property
    def tokens_per_step(self):
        """Accepted drafts + 1, averaged over all steps of all rows; 1.0 if plain, 0.0 if none."""
        return sum(map(sum, self.emitted)) / max(sum(map(len, self.emitted)), 1)

@torch.inference_mode()
def generate(model, heads, input_ids, *, tree=None, accept="greedy", temperature=1.0, epsilon=0.09,
             delta=0.3, max_new_tokens=128, eos_token_id=None, pad_token_id=None, decoder=None,
             attention_mask=None, streamer=None, stopping_criteria=None, max_context=None,
             cuda_graph=None, compile=False):
    """Decode with draft heads; greedy gives plain decoding's text, sampling its distribution.

    input_ids (B, T), padded on either side under attention_mask (B, T).  tree: a Tree, choices, or
    None for the heads' own, else MC_SIM_7B_63 as far as it fits.  accept: "greedy", "typical",
    "sampling" (temperature 0: all greedy), or a rule as for Decoder.  eos_token_id: one, several or
    none.  A row stops at EOS, after max_new_tokens, with max_context tokens (default: what is
    needed, up to the model's longest), and where transformers' stopping_criteria say so.  streamer:
    of transformers, for B = 1; gets prompt and new tokens.  cuda_graph, compile: as for Decoder.
    decoder: used again with all that was set for it.  Returns an Output, or raises ValueError.
    """
    tree = (heads.choices or heads.usual_choices) if tree is None and heads else tree or []
    tree = decoder.tree if decoder else tree if hasattr(tree, "paths") else build_tree(tree)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool()
    lengths = mask.sum(-1).view(-1).tolist()
    require(mask.dim() == 2 and mask.shape == input_ids.shape and min(lengths, default=0) > 0,
            "the prompt is empty: give every row one token or more, and a mask of the same shape")
    require(max_new_tokens >= 0, f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    require(not streamer or len(lengths) == 1, "a streamer shows one row: pass a single prompt")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    max_context = min(limit, max(lengths) + max_new_tokens) if max_context is None else max_context
    rule = accept if callable(accept) else choose_acceptance(accept, temperature, epsilon, delta)
    decoder = decoder or Decoder(model, heads, tree, len(lengths), max_context, rule,
                                 cuda_graph=cuda_graph, compile=compile)
    require(len(decoder.root) == len(lengths), "the decoder's batch size differs")
    max_context = decoder.max_context
    require(max(lengths) <= max_context, f"{max(lengths)} tokens exceed {max_context}: shorten it")
    eos = {eos_token_id} if isinstance(eos_token_id, int) else set(map(int, eos_token_id or ()))
    room = [min(max_new_tokens, max_context - length) for length in lengths]
    new, emitted, prompts = [[] for _ in lengths], [[] for _ in lengths], input_ids.tolist()
    running = [row for row, tokens in enumerate(room) if tokens]
    if streamer:
        streamer.put(input_ids.cpu())
    result = decoder.prefill(input_ids, mask) if running else None
    decoder.root.tolist()  # a GPU may still be at the prefill, which is not timed
    start = time.perf_counter()
    while running:
        tokens, counts = (tensor.tolist() for tensor in result)  # the host's one look at a step
        for row in list(running):
            emitted[row].append(counts[row])
            before = len(new[row])
            for token in tokens[row][:counts[row]]:
                new[row].append(token)
                if token in eos or len(new[row]) == room[row] or stopping_criteria and (
                        stopping_criteria(torch.tensor([prompts[row] + new[row]]), None).all()):
                    running.remove(row)
                    break
        if running:
            decoder.longest = max(lengths[row] + len(new[row]) - 1 for row in running)
            result = decoder.step()
        if streamer:  # B is 1; a GPU is at the next step meanwhile
            streamer.put(torch.tensor(new[0][before:]))
    seconds = time.perf_counter() - start
    if streamer:
        streamer.end()
    pad = pad_token_id if pad_token_id is not None else min(eos, default=0)
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in new], True, pad)
    return Output(torch.cat([input_ids, padded.to(input_ids)], dim=1), tree,
                  [steps[1:] for steps in emitted], new, seconds,
                  sum(part.nbytes for part in decoder.cache.kv.values()))

def generate_plain(model, input_ids, **options):
    """Plain decoding: the same loop with the one-node tree. Arguments as for `generate`."""
    return generate(model, None, input_ids, tree=[], **options)
# --------------------------------------------------------------------------------- 8 training
import argparse, contextlib, json, os, random, re, sys, sysconfig, tempfile  # from here on
from pathlib import Path
from pydoc_data.topics import topics
from tokenizers import ByteLevelBPETokenizer
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.utils import cached_file
KINDS = {  # the paper's recipes: what the heads are, and which losses they learn from
    "medusa": (dict(grounded=False), {}), "hydra": ({}, {}),
    "hydra++": (dict(num_layers=4, prefix_layer=True), dict(lm_weight=0.0, teacher_weight=1.0))}

def read_base(model, heads, input_ids):
    """What training needs of input_ids (B, T): what the heads see, embeddings, base logits."""
    with torch.no_grad():
        out = model(input_ids, output_hidden_states=True, use_cache=False)
        embeddings = model.get_input_embeddings()(input_ids)
    return heads.read_prefix(out.hidden_states[-1]), embeddings, out.logits

def head_losses(heads, hidden, embeddings, input_ids, base_logits, labels=None, *, lm_weight=1.0,
                teacher_weight=0.0):
    """Each head's loss on a text that the base model has read.

    Head i at position t reads the true tokens t+1 .. t+1+i in place of drafts, and is asked for
    token s = t + 2 + i.  lm loss: cross-entropy against token s; teacher loss: against the base's
    distribution for s, which stands at s - 1.  hidden: what the heads see, embeddings (B, T, D),
    input_ids, labels (B, T): -100 where a token does not count, base_logits (B, T, V).
    Returns (K,), each head's mean over what counts.  Paper: 3 and 4.
    """
    labels = input_ids if labels is None else labels
    def loss(i):
        path = embeddings[:, 1:-1].unfold(1, i + 1, 1).transpose(2, 3)  # (B, T-2-i, i+1, D)
        logits = heads(i, hidden[:, :-2 - i], path).flatten(0, 1).float()
        target = labels[:, i + 2:].flatten()                           # (B * (T-2-i),)
        total = lm_weight * F.cross_entropy(logits, target, reduction="none")
        if teacher_weight:
            teacher = base_logits[:, i + 1:-1].flatten(0, 1).float().softmax(-1)
            total = total + teacher_weight * F.cross_entropy(logits, teacher, reduction="none")
        counted = target != -100
        return (total * counted).sum() / counted.sum().clamp(min=1)
    # checkpointed: only one head's logits live at a time, and backward computes them once more
    return torch.stack([checkpoint(loss, i, use_reentrant=False)
                        for i in range(heads.config.num_heads)])

def train_heads(model, heads, token_ids, *, lm_weight=1.0, teacher_weight=0.0, **options):
    """Train draft heads on a text, token_ids (M,); the base model stays as it is.

    options: as for `fit`, at least steps.  Returns its history: K losses each.  Paper: 3, 4.
    """
    def losses(ids):
        hidden, embeddings, logits = read_base(model, heads, ids)
        return head_losses(heads, hidden, embeddings, ids, logits, lm_weight=lm_weight,
                           teacher_weight=teacher_weight)
    return fit(heads, losses, token_ids, **options)

def fit(module, losses_of, token_ids, *, steps, batch_size=8, seq_len=64, lr=1e-3, final_lr=0.33,
        title="", keep=lambda: None):
    """Minimise the sum of losses_of(ids) over random windows (batch_size, seq_len) of a text (M,).

    AdamW on fp32 weights, bf16 autocast (not for fp32 on a CPU), warm-up, cosine to final_lr * lr,
    clipping at 1.  keep(): called at the end or on Ctrl-C.  Returns the losses of every 25th step.
    """
    require(8 <= seq_len <= len(token_ids), f"seq_len must lie in 8 .. {len(token_ids)}, the text")
    parameters, history = list(module.parameters()), []
    dtype, device = parameters[0].dtype, parameters[0].device.type
    set_dtype(module.train(), torch.float32)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, fused=True)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, min(100, steps // 10), steps, min_lr_rate=final_lr)
    chance = torch.Generator().manual_seed(0)  # of the windows
    bar = tqdm(range(steps), title, unit="token", unit_scale=batch_size * seq_len, disable=None)
    try:
        for step in bar:
            start = torch.randint(len(token_ids) - seq_len + 1, (batch_size, 1), generator=chance)
            ids = token_ids[start + torch.arange(seq_len)].long().to(device)
            with torch.autocast(device, torch.bfloat16, device == "cuda" or dtype != torch.float32):
                losses = losses_of(ids)
            optimizer.zero_grad()
            losses.sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 25 == 0 or step == steps - 1:
                history.append(losses.tolist())
                bar.set_postfix(loss=history[-1])
    finally:
        set_dtype(module.eval(), dtype)
        keep()
    return history

@torch.no_grad()
def head_ranks(model, heads, input_ids):
    """Which rank each head gives the true token of a text (B, T), 0 the best: (B, T-1-K, K)."""
    hidden, embeddings, _ = read_base(model, heads, input_ids)
    num_heads, ranks = heads.config.num_heads, []
    for i in range(num_heads):
        path = embeddings[:, 1:-1].unfold(1, i + 1, 1).transpose(2, 3)
        logits = heads(i, hidden[:, :-2 - i], path)                    # (B, T-2-i, V)
        true = logits.gather(-1, input_ids[:, i + 2:, None])
        ranks.append((logits > true).sum(-1)[:, :input_ids.shape[1] - 1 - num_heads])
    return torch.stack(ranks, dim=-1)

def search_tree(ranks, num_nodes):
    """The tree of num_nodes nodes that accepts most drafts, from counted ranks.

    ranks (M, K): of `head_ranks`.  A choice is accepted where the ranks start with it; returned are
    the num_nodes - 1 (or fewer) choices seen most often, in that order; ties: shorter, smaller.
    """
    seen = Counter(tuple(row[:depth]) for row in ranks.tolist() for depth in range(1, len(row) + 1))
    best = sorted(seen, key=lambda choice: (-seen[choice], len(choice), choice))
    return [list(choice) for choice in best[:num_nodes - 1]]

def replay(ranks, choices):
    """Tokens per step that decoding would give, from ranks (B, M, K) along what it would write."""
    choices, steps, tokens = set(map(tuple, choices)), 0, 0
    for row in ranks.tolist():
        while row:
            emitted = 1 + sum(tuple(row[0][:d + 1]) in choices for d in range(len(row[0])))
            row, steps, tokens = row[emitted:], steps + 1, tokens + emitted
    return tokens / max(steps, 1)

def fastest_tree(model, heads, prompts):
    """The choices with which this device decodes prompts (n, T) fastest, greedily, one by one."""
    written = generate_plain(model, prompts, max_new_tokens=128).sequences
    ranks = torch.cat([head_ranks(model, heads, part)[:, prompts.shape[1] - 1:]
                       for part in written.split(8)]).flatten(0, 1)
    trees = [search_tree(ranks, size) for size in (2, 4, 8, 12, 16, 24, 32, 48, 64)]
    return min(trees, key=lambda tree: torch.tensor([
        generate(model, heads, each, tree=tree).seconds for each in prompts[:8].split(1)]).median())
# ----------------------------------------------------------------------------------- 9 models
VICUNA_PROMPT = """A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. \
USER: {{ messages[0].content }} ASSISTANT:"""
BUILT_IN = {  # a Llama's vocabulary, widths, layers, attention heads; training; training of heads
    "demo": ((512, 128, 384, 6, 4), dict(steps=1500, batch_size=4, seq_len=128, lr=4e-3),
             dict(steps=600, batch_size=4, seq_len=128, lr=4e-3)),
    "demo-large": ((8192, 768, 2048, 12, 12), dict(steps=1700, batch_size=64, seq_len=512, lr=1e-3),
                   dict(steps=800, batch_size=32, seq_len=512, lr=1e-3))}

def load(name=None, heads=None, device=None, dtype=None):
    """A base model, its draft heads (or None) and its tokenizer; ValueError says what is missing.

    name: demo, demo-large, vicuna-7b (-13b, -33b), a folder, or a Hub id; None: the base that heads
    name, else demo.  heads: a folder or Hub id; None: those of name.  device, dtype: None is the
    GPU if there is one; fp32 on a CPU, else as saved.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    require(device.type != "cuda" or torch.cuda.is_available(), "no CUDA here: use --device cpu")
    try:
        if name is None:
            name = json.loads(Path(cached_file(str(heads), "config.json")).read_text())[
                "base_model_name_or_path"] if heads else "demo"
        if name in BUILT_IN:
            name = built_in_folder(name, device)
            heads = heads or name / "hydra++"
        elif name in ("vicuna-7b", "vicuna-13b", "vicuna-33b"):
            name, heads = f"lmsys/{name}-v1.3", heads or f"ankner/hydra-{name}-v1.3"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if "vicuna" in str(name).lower() and not tokenizer.chat_template:
            tokenizer.chat_template = VICUNA_PROMPT
        dtype = dtype or ("float32" if device.type == "cpu" else "auto")
        shards = transformers.distributed.DistributedConfig(tp_plan="auto")  # torchrun's processes
        where = dict(distributed_config=shards) if "RANK" in os.environ else dict(device_map=device)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where).eval()
        return model, heads and load_heads(heads, model), tokenizer
    except Exception as error:  # files can be broken in many ways
        raise ValueError(f"cannot load {name}, heads {heads}; give folders: {error}") from error

def load_heads(path_or_repo, model):
    """Heads in the released format, from a folder or the Hub; ValueError names what is wrong."""
    fetch = partial(cached_file, str(path_or_repo))
    get = json.loads(Path(fetch("config.json")).read_text()).get
    arch = get("hydra_head_arch", "mlp")
    require(arch in ("mlp", "prefix-mlp") and not get("hidden_state_offset"),
            f"{path_or_repo}: only mlp and prefix-mlp heads without offset are supported")
    heads = DraftHeads(HydraConfig(get("hydra_num_heads", 4), get("hydra_num_layers", 1), get(
        "grounded_heads", False), arch == "prefix-mlp", get("dropout_rate", 0.0)), model)
    tree = fetch("tree.json", _raise_exceptions_for_missing_entries=False)
    heads.choices = json.loads(Path(tree).read_text()) if tree else None
    unused = ("input_embed_fn.weight", "embed_tokens.weight", "rotary_emb.inv_freq")
    embed = whole(model.get_input_embeddings().weight)
    try:
        file = torch.load(fetch("hydra_lm_head.pt"), map_location="cpu", weights_only=True)
        if not torch.equal(file.get(unused[0], embed).to(embed), embed):
            warnings.warn(f"{path_or_repo} was trained for a base with other embeddings")
        file = {name: file[name] for name in file if not name.endswith(unused)}
        heads.load_state_dict(file)
    except Exception as error:  # truncated, hostile, or of another shape
        raise ValueError(f"{path_or_repo} does not fit this base model: {error}") from error
    for name, tensor in heads.state_dict().items():  # a block used three times is there three times
        require(torch.equal(tensor.cpu(), file[name].to(tensor.dtype)),
                f"{path_or_repo}: {name} should equal the other copies of the same block")
    return heads

def save_heads(heads, path):
    """Write heads in the released format: config.json, hydra_lm_head.pt; the tree as tree.json."""
    about = {"hydra_num_heads": heads.config.num_heads, "hydra_num_layers": heads.config.num_layers,
             "hydra_head_arch": "prefix-mlp" if heads.config.prefix_layer else "mlp",
             "grounded_heads": heads.config.grounded, "dropout_rate": heads.config.dropout,
             "base_model_name_or_path": heads.base_name}
    (path := Path(path)).mkdir(parents=True, exist_ok=True)
    torch.save(heads.state_dict(), path / "hydra_lm_head.pt.part")
    (path / "config.json.part").write_text(json.dumps(about, indent=1))
    (path / "tree.json.part").write_text(json.dumps(heads.choices))
    for part in path.glob("*.part"):
        os.replace(part, part.with_suffix(""))  # each file is whole, or it is not there
DraftHeads.from_pretrained, DraftHeads.save_pretrained = staticmethod(load_heads), save_heads

def read_texts(paths):
    """Texts, none twice: files, and a folder's .txt, .md and .py files."""
    files = [file for path in map(Path, paths) for file in (sorted(path.rglob("*")) or [path])
             if file == path or file.is_file() and file.suffix in (".txt", ".md", ".py")]
    return list(dict.fromkeys(file.read_text("utf-8", "replace") for file in files))

def encode(tokenizer, texts):
    """Token ids of texts, one behind the other, in three: to train on, choose a tree, compare."""
    parts = (tokenizer(texts[k:k + 1000]).input_ids for k in range(0, len(texts), 1000))
    ids = torch.tensor([token for rows in parts for row in rows for token in row]).int()
    return ids.tensor_split((len(ids) * 90 // 100, len(ids) * 95 // 100))

def cut(ids, count, width, device):
    """At most count pieces of a text, (n, width), evenly spread."""
    require(len(ids) >= width and count > 0, f"{len(ids)} held-out tokens are too few: more text")
    pieces = ids[:len(ids) // width * width].view(-1, width)
    return pieces[::max(1, len(pieces) // count)][:count].long().to(device)

def make_heads(kind, model, texts, folder, num_heads=4, **options):
    """The heads of a kind in folder, with their tree; trained there, or further, if need be."""
    config, losses = HydraConfig(num_heads, **KINDS[kind][0]), KINDS[kind][1]
    saved = (Path(folder) / "hydra_lm_head.pt").exists()
    heads = load_heads(folder, model) if saved else DraftHeads(config, model)
    require(heads.config == config, f"{folder} holds other heads than {num_heads} of {kind}")
    if heads.choices is None:  # the tree comes last
        train_heads(model, heads, texts[0], title=kind, keep=partial(save_heads, heads, folder),
                    **losses, **options)
        heads.choices = fastest_tree(model, heads, cut(texts[1], 64, 32, model.device))
        save_heads(heads, folder)
    else:
        print(f"hydra.py: {folder} holds finished heads, used as they are", file=sys.stderr)
    return heads

def build(name, folder, device):
    """Train a built-in model: on part of Python's manual, or on the Python source found here."""
    (vocab, width, inner, layers, attention), options, head_options = BUILT_IN[name]
    if name == "demo":
        names = """for while if try with class function import return raise break continue pass del
                   assert global nonlocal async lambda""".split()
        parts = "\n\n".join(topics[name] for name in names).split("\n\n")
        texts = ["\n".join(" ".join(re.sub(r'["*]', "", part).split()) for part in parts
                           if not re.search("^  |::=", part) and len(part) > 50)]  # prose
    else:
        texts = read_texts([sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")])
        random.Random(0).shuffle(texts)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts[:4000], vocab_size=vocab, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    texts = encode(tokenizer, texts)
    texts = [torch.cat(texts)] * 3 if name == "demo" else texts  # too short to hold a part out
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=attention, bos_token_id=None, eos_token_id=None, name_or_path=name))
    fit(model.to(device), lambda ids: model(ids, labels=ids).loss, texts[0],
        title=name, final_lr=0.1, **options)
    set_dtype(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    torch.save(texts, folder / "texts.pt")
    make_heads("hydra++", model, texts, folder / "hydra++", **head_options)

def built_in_folder(name, device):
    """Where a built-in model lies in the user's cache; trained there first if it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra"
    folder = cache / f"{name}-1"  # another number where its recipe changes
    if not folder.exists():
        print(f"hydra.py: training the {name} model, once", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            build(name, Path(work) / name, device)
            with contextlib.suppress(OSError):  # another process may have been faster
                os.replace(Path(work) / name, folder)
    return folder
# ---------------------------------------------------------------------------- 10 command line
DECODING = ("max_new_tokens", "max_context", "accept", "temperature", "epsilon", "delta")
TRAINING = ("steps", "batch_size", "seq_len", "lr", "num_heads")
HEADER = "method           nodes  tokens/step  ms/step  tokens/s  x plain  4-grams  as plain"

class ColourStreamer(transformers.TextStreamer):
    """Prints text word by word; a word is green when its last token is an accepted draft."""
    green = False
    def put(self, value):
        for place, piece in enumerate(value.split(1), start=1):  # the prompt, or a step's tokens
            super().put(piece)  # prints the word before, in the last token's colour
            self.green = place < len(value)
    def on_finalized_text(self, text, stream_end=False):
        colour = self.green and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        super().on_finalized_text(f"\033[32m{text}\033[0m" if colour else text, stream_end)

def figures(name, outs, plain):
    """A line under HEADER: some prompts' Outputs against plain's; 4-grams: distinct ones' share."""
    rows, expected = ([row for out in some for row in out.new_tokens] for some in (outs, plain))
    grams = [tuple(row[k:k + 4]) for row in rows for k in range(len(row) - 3)]
    counts = [count for out in outs for row in out.emitted for count in row] or [0]
    seconds, base = (sum(out.seconds for out in some) or 1e-9 for some in (outs, plain))
    made = lambda rows: sum(len(row[1:]) for row in rows)  # prefill gave the first token
    rate, base = made(rows) / seconds, (made(expected) or 1) / base
    return (f"{name:16}{outs[0].tree.num_nodes:6}{sum(counts) / len(counts):13.2f}"
            f"{1000 * seconds * len(rows) / len(counts) / len(outs):9.2f}{rate:10.0f}"
            f"{rate / base:9.2f}{len(set(grams)) / max(len(grams), 1):9.0%}"
            f"{f'{sum(map(list.__eq__, rows, expected))}/{len(rows)}':>10}")

def study(args, model, tokenizer):
    """Train heads of one kind, or of all to compare them: a line of figures for each tree."""
    name = args.model or ("" if args.heads else "demo")
    require(args.save not in (None, name) if args.train else name in BUILT_IN,
            "give --train TEXT and --save, a folder for the heads")
    folder = Path(args.save or built_in_folder(name, model.device))
    texts = encode(tokenizer, read_texts(args.train)) if args.train else torch.load(
        built_in_folder(name, model.device) / "texts.pt")
    training = BUILT_IN.get(name, BUILT_IN["demo-large"])[-1] | {
        option: value for option in TRAINING if (value := getattr(args, option)) is not None}
    prompts, real = (cut(texts[2], count, width, model.device)
                     for count, width in ((args.num_prompts, 32), (32, 160)))
    def decode(heads, choices, rule):
        decoder = Decoder(model, heads, build_tree(choices), 1, 32 + args.max_new_tokens, rule,
                          compile=args.compile, cuda_graph=args.cuda_graph)
        return [generate(model, heads, prompt[None], max_new_tokens=args.max_new_tokens,
                         decoder=decoder) for prompt in prompts]
    rule = choose_acceptance(args.accept, args.temperature, args.epsilon, args.delta)
    plain = decode(None, [], rule)
    print(f"{HEADER}  sampled  real text\n{figures('plain', plain, plain)}")
    for kind in KINDS if args.compare else [args.kind]:
        heads = make_heads(kind, model, texts, folder / kind if args.compare else folder,
                           **training)
        on_real = head_ranks(model, heads, real)
        for label, choices in ((kind, heads.choices), (kind + ", mc_sim", heads.usual_choices)):
            outs = decode(heads, choices, rule)
            drawn = decode(heads, choices, partial(accept_sampling, temperature=1.0))
            sampled = sum(out.tokens_per_step for out in drawn) / len(drawn)
            print(f"{figures(label, outs, plain)}{sampled:9.2f}{replay(on_real, choices):11.2f}")

def run(args):
    """Stream the text to standard output, the figures behind it to standard error."""
    model, heads, tokenizer = load(args.model, args.heads, args.device, args.dtype)
    torch.manual_seed(args.seed)
    if args.train or args.compare:
        return study(args, model, tokenizer)
    if not heads:
        print("hydra.py: no draft heads: --train TEXT --save FOLDER makes some", file=sys.stderr)
    chat = bool(tokenizer.chat_template) and not args.raw
    text = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    text = ("What is a tree?" if chat else "The try statement") if text is None else text
    bare = not chat or tokenizer.chat_template == VICUNA_PROMPT  # other templates write BOS
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=bare).input_ids], device=model.device)
    named = {None: None, "none": [], "mc_sim_7b_63": MC_SIM_7B_63}
    tree = named[args.tree] if args.tree in named else json.loads(Path(args.tree).read_text())
    options = {name: getattr(args, name) for name in (*DECODING, "compile", "cuda_graph")}
    options["eos_token_id"] = model.generation_config.eos_token_id
    streamer = ColourStreamer(tokenizer, chat, skip_special_tokens=True)
    out = generate(model, heads, ids, tree=tree, streamer=streamer, **options)
    torch.manual_seed(args.seed)
    plain = generate_plain(model, ids, **options)
    same = out.new_tokens == plain.new_tokens
    size = lambda module: sum(part.nbytes for part in module.parameters()) >> 20 if module else 0
    print("", HEADER, figures("plain", [plain], [plain]), figures("draft heads", [out], [plain]),
          f"MiB: base {size(model)}, heads {size(heads)}, cache {out.cache_bytes >> 20}, "
          f"peak on the GPU {torch.cuda.max_memory_allocated() >> 20}",
          f"output {'identical to' if same else 'not'} plain decoding's", sep="\n", file=sys.stderr)

def main(argv=None):
    """The command line. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="hydra.py", description="Decode with Hydra draft heads.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", help="demo, demo-large, vicuna-7b, -13b, -33b, a folder, or a Hub id")
    add("--heads", help="folder or Hub id of draft heads; None: those of the model")
    add("--prompt", help="the text to go on with; -: standard input; None: one that fits")
    add("--raw", action="store_true", help="the prompt as it is, without a chat template")
    add("--seed", type=int, default=0, help="of sampling and training")
    add("--tree", help="mc_sim_7b_63, a JSON file of choices, or none; None: the heads' own")
    add("--device", help="cuda, cpu or mps; None: cuda if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="None: fp32 on a CPU, else own")
    add("--no-cuda-graph", action="store_const", const=False, dest="cuda_graph", help="eager steps")
    add("--compile", action="store_true", help="pass the step through torch.compile")
    add("--compare", action="store_true", help="train every kind of heads, print a table")
    add("--train", nargs="+", help="text files or folders: train heads on it, print a table")
    add("--save", help="folder for the heads that are trained")
    add("--kind", choices=KINDS, default="hydra++", help="of the heads that are trained")
    add("--num-prompts", type=int, default=8, help="prompts to decode for the table")
    for function, names in ((generate, DECODING), (fit, TRAINING)):
        group = parser.add_argument_group(f"as in {function.__name__}()", function.__doc__)
        for name in names:
            default = getattr(inspect.signature(generate).parameters.get(name), "default", None)
            group.add_argument("--" + name.replace("_", "-"), default=default, help=" ",
                               type=float if name == "lr" else type(default or 0))
    args = parser.parse_args(argv)
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes
        sys.stdout = sys.stderr = open(os.devnull, "w")
    transformers.utils.logging.disable_progress_bar()
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        more = "; lower --max-new-tokens" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"hydra.py: {' '.join(str(error).split())}{more}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
