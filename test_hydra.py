# SPDX-License-Identifier: MIT
"""Tests of hydra.py, one group for each of its sections, in its order; also a course autograder.

    pytest                                             everything
    pytest -k acceptance                               one section
    pytest -k accept_typical                           one exercise
    HYDRA_FUZZ_SEED=1 HYDRA_FUZZ_CASES=500 pytest -k fuzz    other random cases, and more of them
    HYDRA=my_solution pytest -k tree_attention_mask    the same exercise in my_solution.py
    HYDRA=my_solution HYDRA_REF=hydra pytest           every exercise graded alone: whatever else
                                                       a test calls comes from hydra.py
    python test_hydra.py --handout > my_solution.py    hydra.py with the exercises left blank
    python test_hydra.py --grade my_solution.py        10 points for each exercise that passes
                                                       all of its tests; --json prints JSON
    python test_hydra.py --steps                       what a decode step costs on this machine
    python test_hydra.py --compare                     Medusa, Hydra and Hydra++ side by side

An exercise's tests carry its name. Expected values come from literals, from slow loops written
straight from the definitions, and from `model.generate`, never from the function under test.
"""
import argparse
import ast
import contextlib
import copy
import doctest
import gc
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial, wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.testing import assert_close
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

hydra = importlib.import_module(os.environ.get("HYDRA", "hydra"))
reference = importlib.import_module(os.environ["HYDRA_REF"]) if "HYDRA_REF" in os.environ else None
EXERCISES = ["head_input", "build_tree", "tree_attention_mask", "draft_tree", "accept_greedy",
             "accept_typical", "accept_sampling", "commit_path", "head_losses", "search_tree"]
POINTS = 10  # for an exercise all of whose tests pass; else none

torch.set_num_threads(1)  # the models here are so small that threads only wait for each other
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def graded_alone(request, monkeypatch):
    """With HYDRA_REF: put the reference in the place of every exercise but the one under test."""
    if reference is None:
        return
    tested = [name for name in EXERCISES if name in request.node.name]
    assert len(tested) <= 1, f"a test belongs to one exercise, not to {tested}"
    for name in EXERCISES:
        if name not in tested and hasattr(reference, name):
            monkeypatch.setattr(hydra, name, getattr(reference, name), raising=False)


def handout(exercises=EXERCISES, body="raise NotImplementedError"):
    """hydra.py with body in place of the exercises' own; their docstrings and all else stay."""
    source = inspect.getsource(reference or hydra)
    lines = source.splitlines(keepends=True)
    for function in reversed(ast.parse(source).body):
        if isinstance(function, ast.FunctionDef) and function.name in exercises:
            docstring = function.body[0]
            lines[docstring.end_lineno:function.end_lineno] = [f"    {body}\n"]
    return "".join(lines)


# ------------------------------------------------------------------------------ what tests need

VOCAB, WIDTH, LIMIT, NUM_HEADS = 32, 32, 96, 4  # LIMIT: the longest context of the bases below
SEVEN = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]  # the running example of hydra.py
KINDS = {"medusa": dict(grounded=False), "hydra": dict(),
         "hydra++": dict(num_layers=4, prefix_layer=True)}
WINDOW = 9
BASES = {
    "llama": ("LlamaConfig", {}),
    "llama-gqa": ("LlamaConfig", dict(num_key_value_heads=2, rope_parameters=dict(
        rope_type="default", rope_theta=500.0))),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=1, head_dim=16)),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=None)),
    "gemma": ("GemmaConfig", dict(num_key_value_heads=2, head_dim=16)),
    "phi3": ("Phi3Config", dict(num_key_value_heads=2)),
    "phi": ("PhiConfig", {}),  # its lm_head has a bias
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),  # learned positions: none behind the last
    "opt": ("OPTConfig", dict(ffn_dim=48, word_embed_proj_dim=WIDTH, init_std=0.5)),
    "falcon": ("FalconConfig", dict(alibi=False, multi_query=True, ffn_hidden_size=48)),
    "granite": ("GraniteConfig", dict(  # it scales embeddings, layers, attention and logits
        num_key_value_heads=2, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_multiplier=0.3, logits_scaling=0.25)),
    "mixtral": ("MixtralConfig", dict(num_key_value_heads=2, num_local_experts=4)),
}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = dict(layer_types=[SLIDING, FULL, SLIDING], head_dim=16)
SLIDING_BASES = {  # layers that see the last WINDOW tokens only; the first five have no layer types
    "mistral-sliding": ("MistralConfig", {}),
    "phi3-sliding": ("Phi3Config", {}),
    "mixtral-sliding": ("MixtralConfig", dict(num_local_experts=4)),
    "starcoder2-sliding": ("Starcoder2Config", {}),
    "qwen3-moe-sliding": ("Qwen3MoeConfig", dict(
        use_sliding_window=True, head_dim=16, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2)),
    "gemma2-sliding": ("Gemma2Config", MIXED | dict(tie_word_embeddings=False)),
    "gemma3-sliding": ("Gemma3TextConfig", MIXED | dict(  # RoPE differs between its layer types
        tie_word_embeddings=False, query_pre_attn_scalar=1)),
    "cohere2-sliding": ("Cohere2Config", MIXED),  # no RoPE where attention is full
    "olmo3-sliding": ("Olmo3Config", MIXED),
    "qwen2-sliding": ("Qwen2Config", MIXED | dict(use_sliding_window=True)),
    "qwen3-sliding": ("Qwen3Config", MIXED | dict(use_sliding_window=True)),
    "smollm3-sliding": ("SmolLM3Config", MIXED | dict(use_sliding_window=True)),
    "gpt-oss-sliding": ("GptOssConfig", MIXED | dict(num_local_experts=4)),
    "ministral-sliding": ("MinistralConfig", MIXED | dict(layer_types=[SLIDING] * 3)),
}


@lru_cache(maxsize=None)
def base(name, dtype=torch.float32, device="cpu", **changes):
    """A tiny random base model. Its weights are large, so that its greedy text varies."""
    config, own = (BASES | SLIDING_BASES)[name]
    settings = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LIMIT, initializer_range=0.5, pad_token_id=None, bos_token_id=None,
        eos_token_id=None)
    settings |= {} if name in ("gpt2", "opt", "falcon") else dict(intermediate_size=48)
    if name in SLIDING_BASES:
        settings |= dict(sliding_window=WINDOW, num_hidden_layers=3, num_key_value_heads=2)
    torch.manual_seed(1)
    config = getattr(transformers, config)(**settings | own | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(device, dtype)
    return model.requires_grad_(False)


def make_heads(kind, model, seed=0, **changes):
    """Draft heads with random weights throughout."""
    heads = hydra.DraftHeads(hydra.HydraConfig(**KINDS[kind] | changes), model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.normal_(std=0.3)
    return heads


def random_choices(seed, size=16, depth=NUM_HEADS, ranks=7):
    """A random tree: ranks with gaps, children below any node."""
    chance, choices = random.Random(seed), [()]
    while len(choices) < size:
        parent = chance.choice([choice for choice in choices if len(choice) < depth])
        choice = (*parent, chance.randrange(ranks))
        choices += [choice] if choice not in choices else []
    chance.shuffle(choices)
    return [list(choice) for choice in choices if choice]


def ancestors(choices, node):
    """The nodes from depth 1 to node itself, found by name."""
    choices = sorted(map(tuple, choices), key=lambda choice: (len(choice), choice))
    choice = choices[node - 1] if node else ()
    return [choices.index(choice[:depth]) + 1 for depth in range(1, len(choice) + 1)]


def random_prompts(seed, *lengths):
    chance = random.Random(seed)
    return [tuple(chance.choices(range(VOCAB), k=length)) for length in lengths]


def pad(prompts, side="right", device="cpu"):
    """A ragged batch: input_ids and attention_mask, both (B, T)."""
    width = max(map(len, prompts))
    fill = [[0] * (width - len(prompt)) for prompt in prompts]
    join = (lambda row, rest: row + rest) if side == "right" else (lambda row, rest: rest + row)
    ids = [join(list(prompt), rest) for prompt, rest in zip(prompts, fill)]
    mask = [join([1] * len(prompt), rest) for prompt, rest in zip(prompts, fill)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@lru_cache(maxsize=None)
def continuation(model, prompt, limit=LIMIT):
    """What `model.generate` writes after prompt until the context is full: the oracle."""
    if len(prompt) >= limit:
        return []
    ids = torch.tensor([prompt], device=model.device)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          max_new_tokens=limit - len(prompt), pad_token_id=0, eos_token_id=None)
    return text[0, len(prompt):].tolist()


def wanted(model, prompt, max_new_tokens, eos=(), limit=LIMIT):
    """The oracle's text, cut after the first EOS or at max_new_tokens."""
    new = continuation(model, prompt, limit)[:max_new_tokens]
    stop = next((place + 1 for place, token in enumerate(new) if token in eos), len(new))
    return new[:stop]


def assert_greedy(model, prompts, output, max_new_tokens, eos=(), padding=0, limit=LIMIT):
    """Row by row what the oracle writes; returns the rows that parted at a near tie (excused)."""
    start, tied = max(map(len, prompts)), []
    rows = output.sequences[:, start:].tolist()
    texts = [wanted(model, prompt, max_new_tokens, eos, limit) for prompt in prompts]
    for row, (prompt, text, got) in enumerate(zip(prompts, texts, rows)):
        if got[:len(text)] == text and all(token == padding for token in got[len(text):]):
            assert len(got) == max(map(len, texts)) or tied
            before = 1 + sum(output.emitted[row]) if text else 0
            assert before >= len(text)                                # what the steps emitted
            assert not output.emitted[row] or before - output.emitted[row][-1] < len(text)
            continue
        place = next(k for k, pair in enumerate(zip(got, text)) if pair[0] != pair[1])
        ids = torch.tensor([[*prompt, *text[:place]]], device=model.device)
        first, second = model(ids).logits[0, -1].double().topk(2).values.tolist()
        allowed = 4 * 2 ** -8 * abs(first) if model.dtype == torch.bfloat16 else 1e-5
        assert first - second <= allowed, f"row {row} parts from generate at new token {place}"
        tied.append(row)
    return tied


class ScriptedHeads(hydra.DraftHeads):
    """Draft heads that know what the base will write, and tell it as far as they are told to.

    They recognise the position by the hidden state they are given (or, with a prefix layer, by
    its output), and give nothing away unless the embeddings are those of the true tokens. So the
    drafts they get accepted are known beforehand, and a decode loop that hands them a wrong state
    or a wrong path is found out. pick: position -> choice, the path along which they are right.
    """

    def script(self, model, prompts, pick, limit=LIMIT):
        self.embed, states, future = model.get_input_embeddings(), [], []
        for prompt in prompts:
            text = torch.tensor([*prompt, *continuation(model, prompt, limit)])
            hidden = model(text[None], output_hidden_states=True).hidden_states[-1]
            ahead = F.pad(text, (0, NUM_HEADS + 1), value=-1).unfold(0, NUM_HEADS + 2, 1)
            new = slice(len(prompt) - 1, None)                        # where drafting can start
            states.append(self.read_prefix(hidden)[0, new])
            future.append(ahead[new, 1:])                             # tokens t+1 .. t+1+K
        self.states, self.future = torch.cat(states), torch.cat(future)
        self.starts = [0, *itertools.accumulate(map(len, states))]
        # a text that repeats one token has one state throughout: count it as one position
        self.first = ((self.states[:, None] - self.states).norm(dim=-1) < 2e-3).int().argmax(1)
        self.picks = [list(pick(t)) for t in range(len(self.states))]
        never = [VOCAB - 1] * NUM_HEADS                               # the rank of no choice
        self.answer_ranks = torch.tensor([(choice + never)[:NUM_HEADS] for choice in self.picks])
        return self

    def forward(self, i, hidden, embeddings):
        distance, place = (hidden - self.states).norm(dim=-1).min(-1)
        place = self.first[place]
        path, answer = self.future[place, :i + 1], self.future[place, i + 1]
        known = ((distance < 1e-3) & (answer >= 0))[:, None]          # (B, 1)
        if self.config.grounded:                                      # (B, n)
            path = self.embed(path.clamp(min=0))[:, None]
            known = known & (embeddings == path).flatten(2).all(-1)
        rank = torch.where(known, self.answer_ranks[place, i, None], VOCAB - 1)
        logits = torch.rand(*rank.shape, VOCAB, dtype=torch.float64)
        answer = answer.clamp(min=0)[:, None, None].expand(*rank.shape, 1)
        others = logits.scatter(2, answer, -1.0).sort(descending=True).values
        bounds = F.pad(others[..., :-1], (1, 0), value=2.0)           # rank r lies between
        bounds = F.pad(bounds, (0, 1), value=-1.0)                    # bounds r and r + 1
        between = bounds.gather(2, rank[..., None]) + bounds.gather(2, rank[..., None] + 1)
        return logits.scatter(2, answer, between / 2)

    def accepted(self, row, num_new):
        """The accepted drafts of every step that row should take to num_new tokens."""
        done, steps = 1, []
        while done < num_new:
            steps.append(len(self.picks[self.first[self.starts[row] + done - 1]]))
            done += steps[-1] + 1
        return steps


def scripted_heads(kind, model, prompts, choices, drafter="varied", seed=0, limit=LIMIT):
    """Right along a longest path, along a random one of random depth, or never."""
    levels = [[choice for choice in [[], *choices] if len(choice) == depth]
              for depth in range(1 + max(map(len, choices), default=0))]
    chance = random.Random(seed)
    pick = dict(oracle=lambda t: chance.choice(levels[-1]), wrong=lambda t: [],
                varied=lambda t: chance.choice(chance.choice(levels)))[drafter]
    torch.manual_seed(seed)
    heads = ScriptedHeads(hydra.HydraConfig(**KINDS[kind]), model)
    return heads.script(model, prompts, pick, limit)


def decoder_after_prompt(model, heads, choices, prompts, accept=None, side="right"):
    tree = hydra.build_tree(choices)
    decoder = hydra.Decoder(model, heads, tree, len(prompts), LIMIT, accept)
    return decoder, decoder.prefill(*pad(prompts, side))


def assert_distributed(outcomes, probs):
    """Pearson's chi-squared test of outcomes (M,) against probs (C,), at five sigma."""
    counts = torch.bincount(outcomes, minlength=len(probs)).double()
    expected = probs.double() * len(outcomes)
    assert counts[expected == 0].sum() == 0, "something happened that cannot"
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    freedom = len(counts) - 1
    distance = ((counts - expected) ** 2 / expected.clamp(min=1)).sum().item()
    assert distance < freedom + 5 * (2 * freedom) ** 0.5


# ------------------------------------------------------------------------------ 1 draft heads

def test_draft_heads_head_input_is_hidden_then_embeddings_oldest_first():
    hidden, embeddings = torch.randn(2, 3, 4), torch.randn(2, 3, 5, 4)
    got = hydra.head_input(hidden, embeddings)
    assert got.shape == (2, 3, 6 * 4)
    assert_close(got[..., :4], hidden)
    for k in range(5):
        assert_close(got[..., 4 * (k + 1):4 * (k + 2)], embeddings[..., k, :])


@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_draft_heads_equal_their_formula(kind, num_layers):
    """Weights by their released names: block j is number 2j + 1 beside a prefix layer, else j."""
    heads = make_heads(kind, base("llama"), num_layers=num_layers)
    hidden, embeddings = torch.randn(2, 1, WIDTH), torch.randn(2, 5, NUM_HEADS, WIDTH)
    weights = heads.state_dict()
    for i in range(NUM_HEADS):
        x, inner = hidden, "1." if kind == "hydra++" else ""
        if kind != "medusa":
            x = torch.cat([hidden.expand(2, 5, WIDTH), *embeddings[:, :, :i + 1].unbind(2)], -1)
        for j in range(num_layers):
            name = f"hydra_mlp.{i}.{2 * j + 1 if inner else j}."
            w, b = weights[name + "linear.weight"], weights[name + "linear.bias"]
            step, rest = x @ w.T + b, x
            assert (name + "res_connection.weight" in weights) == (j == 0 and kind != "medusa")
            if j == 0 and kind != "medusa":
                rest = x @ weights[name + "res_connection.weight"].T
                rest = rest + weights[name + "res_connection.bias"]
            elif j > 1:  # blocks after the first are one and the same
                last = f"hydra_mlp.{i}.{2 * j - 1 if inner else j - 1}.linear.weight"
                assert w.data_ptr() == weights[last].data_ptr()
            x = rest + step * torch.sigmoid(step)
        name = f"hydra_lm_head.{i}.{inner}"
        expected = x @ weights[name + "weight"].T + weights[name + "bias"]
        assert_close(heads(i, hidden, embeddings[:, :, :i + 1]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_draft_heads_start_from_the_base(name):
    model = base(name)
    heads = hydra.DraftHeads(hydra.HydraConfig(num_layers=3), model)
    assert not heads.training and heads.config.num_heads == 4
    steps = [w for key, w in heads.named_parameters() if key.endswith("linear.weight")]
    assert len(steps) == 8 and not any(w.any() for w in steps)  # two different blocks for each head
    own, bias = heads.state_dict(), model.lm_head.bias
    for i in range(4):
        weight = own[f"hydra_lm_head.{i}.weight"]
        assert_close(weight, model.lm_head.weight)
        assert weight.data_ptr() != model.lm_head.weight.data_ptr()
        assert_close(own[f"hydra_lm_head.{i}.bias"], torch.zeros(VOCAB) if bias is None else bias)


def test_draft_heads_of_medusa_read_no_tokens():
    hidden, embeddings = torch.randn(2, 1, WIDTH), torch.randn(2, 3, 2, WIDTH)
    medusa, grounded = (make_heads(kind, base("llama")) for kind in ("medusa", "hydra"))
    assert medusa(1, hidden, embeddings).shape == (2, 1, VOCAB)
    assert grounded(1, hidden, embeddings).shape == (2, 3, VOCAB)
    assert_close(medusa(1, hidden, embeddings), medusa(1, hidden, embeddings + 1))
    for token in range(2):  # each of a grounded head's tokens matters
        other = embeddings.clone()
        other[:, :, token] += 1
        assert not torch.allclose(grounded(1, hidden, embeddings), grounded(1, hidden, other))


def test_draft_heads_drop_out_in_training_only():
    heads = make_heads("hydra++", base("llama"), dropout=0.5)
    example = 0, torch.randn(1, 1, WIDTH), torch.randn(1, 1, 1, WIDTH)
    assert torch.equal(heads(*example), heads(*example))
    heads.train()
    assert not torch.equal(heads(*example), heads(*example))


def test_draft_heads_drop_out_beside_a_prefix_layer_only():
    with pytest.raises(ValueError, match="dropout needs prefix_layer"):
        hydra.HydraConfig(dropout=0.5)


@pytest.mark.parametrize("name", [*BASES, *SLIDING_BASES])
def test_draft_heads_prefix_layer_is_one_causal_layer_of_the_base(name):
    model = base(name)
    before = model.config.to_dict()
    heads = make_heads("hydra++", model)
    assert model.config.to_dict() == before
    own = {key.split(".", 1)[1] for key, _ in heads.named_parameters() if key.startswith("prefix")}
    base_names = {key.split(".", 1)[1] for key, _ in model.named_parameters() if "." in key}
    assert own and not any("embed_tokens" in key or "wte" in key for key in own)
    assert {key for key in own if ".1." in key} == set() and own <= base_names
    hidden = torch.randn(2, WINDOW + 3, WIDTH)
    whole = heads.read_prefix(hidden)
    assert_close(heads.read_prefix(hidden[:, :5]), whole[:, :5], atol=1e-4, rtol=1e-4)
    other = hidden.clone()
    other[:, 0] = torch.randn(WIDTH)  # what comes first reaches what comes last, through no window
    assert not torch.allclose(heads.read_prefix(other)[:, -1], whole[:, -1])
    assert make_heads("hydra", model).read_prefix(hidden) is hidden


@pytest.mark.parametrize("kind", KINDS)
def test_draft_heads_in_half_precision_keep_the_frequencies_of_their_positions(kind):
    model = base("llama", torch.bfloat16)
    heads = make_heads(kind, model)
    assert {weight.dtype for weight in heads.parameters()} == {torch.bfloat16}
    if kind == "hydra++":
        assert heads.prefix_embeding_layer.rotary_emb.inv_freq.dtype == torch.float32


def test_draft_heads_know_the_base_they_are_made_for():
    heads = make_heads("hydra", base("llama", vocab_size=40))
    assert (heads.vocab, heads.width, heads.base_name) == (40, WIDTH, "")


# -------------------------------------------------------------------------------------- 2 tree

def test_tree_build_tree_running_example():
    tree = hydra.build_tree([(0, 0, 0), [1, 0], [0], [0, 1], [1], (0, 0)])  # in any order
    assert tree.choices == SEVEN and tree.num_nodes == 7
    assert tree.parents.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert tree.ranks.tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert tree.paths.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 3, 3],
                                   [0, 1, 4, 4], [0, 2, 5, 5], [0, 1, 3, 6]]
    assert tree.mask.dtype == torch.bool and tree.mask.sum(1).tolist() == [1, 2, 2, 3, 3, 3, 4]
    assert tree.levels == [slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 7)]
    assert (tree.max_depth, tree.num_guesses) == (3, 2)


@pytest.mark.parametrize("seed", range(8))
def test_tree_build_tree_random(seed):
    choices = random_choices(seed, size=5 + 4 * seed, depth=2 + seed % 4)
    tree = hydra.build_tree(choices)
    assert tree.choices == sorted(choices, key=lambda choice: (len(choice), choice))
    deepest = max(map(len, choices))
    for node, choice in enumerate(tree.choices, start=1):
        line = ancestors(choices, node)
        assert tree.parents[node] == ([0] + line)[-2]
        assert tree.depths[node] == len(choice) and tree.ranks[node] == choice[-1]
        assert tree.paths[node].tolist() == ([0] + line + [node] * deepest)[:deepest + 1]
        assert tree.mask[node].nonzero()[:, 0].tolist() == sorted([0] + line)
    assert tree.max_depth == deepest == len(tree.levels) - 1
    assert tree.num_guesses == 1 + max(map(max, choices))
    nodes = list(range(tree.num_nodes))
    for depth, level in enumerate(tree.levels):
        assert nodes[level] == [node for node in nodes if tree.depths[node] == depth]


def test_tree_build_tree_of_the_root_alone():
    tree = hydra.build_tree([])
    assert tree.num_nodes == 1 and tree.parents.tolist() == tree.depths.tolist() == [0]
    assert tree.paths.tolist() == [[0]] and tree.mask.tolist() == [[True]]
    assert (tree.levels, tree.max_depth, tree.num_guesses) == ([slice(0, 1)], 0, 1)


@pytest.mark.parametrize("choices, message", [
    ([[0], [1, 0]], r"\[1, 0\] has no parent.*\[1\]"), ([[0], [0, 0, 0], [1]], r"\[0, 0\]"),
    ([[0], [1], (0,)], r"\[0\] is there twice"), ([[0], [-1]], r"\[-1\]"), ([[0], []], r"\[\]"),
    ([0], "choice 0 must be a list"), ([[0], [0.5]], "0.5"), ([["a"]], "'a'"), ([[True]], "True"),
    ("0", "choice '0' must be a list")])
def test_tree_build_tree_names_the_malformed_choice(choices, message):
    with pytest.raises(ValueError, match=message):
        hydra.build_tree(choices)


def test_tree_mc_sim_7b_63_is_the_published_one():
    choices = hydra.MC_SIM_7B_63
    assert [sum(len(c) == depth for c in choices) for depth in range(1, 6)] == [10, 28, 23, 2, 0]
    children = [[0, 9], [1, 6], [2, 2], [3, 1], [4, 0], [9, 0], [0, 0, 9], [0, 1, 2], [0, 2, 1],
                [0, 3, 0], [0, 7, 0], [1, 0, 1], [2, 0, 0], [0, 0, 0, 1]]
    assert all(choice in choices for choice in children)
    assert not any([*choice[:-1], choice[-1] + 1] in choices for choice in children)
    assert hydra.build_tree(choices).num_nodes == 64


def test_tree_moves_to_a_device_as_a_copy():
    tree = hydra.build_tree(SEVEN)
    moved = tree.to("meta")
    assert (moved.choices, moved.num_nodes) == (SEVEN, 7) and moved.levels == tree.levels
    for name in ("parents", "depths", "ranks", "paths", "mask"):
        assert getattr(moved, name).is_meta and not getattr(tree, name).is_meta


# ---------------------------------------------------------------------------- 3 tree attention

def test_tree_attention_mask_running_example():
    T, F = True, False
    assert hydra.tree_attention_mask(torch.tensor([0, 0, 0, 1, 1, 2, 3])).tolist() == [
        [T, F, F, F, F, F, F],
        [T, T, F, F, F, F, F],
        [T, F, T, F, F, F, F],
        [T, T, F, T, F, F, F],
        [T, T, F, F, T, F, F],
        [T, F, T, F, F, T, F],
        [T, T, F, T, F, F, T]]


@pytest.mark.parametrize("seed", range(8))
def test_tree_attention_mask_is_ancestor_or_self(seed):
    chance = random.Random(seed)
    parents = [0] + [chance.randrange(node) for node in range(1, 2 + 5 * seed)]
    got = hydra.tree_attention_mask(torch.tensor(parents))
    assert got.dtype == torch.bool and got.shape == (len(parents), len(parents))
    slow = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        slow[node, node] = slow[node, 0] = True
        ancestor = node
        while ancestor:
            ancestor = parents[ancestor]
            slow[node, ancestor] = True
    assert torch.equal(got, slow)


def test_tree_attention_visible_slots_are_the_prefix_and_the_ancestors():
    T, F = True, False
    mask = torch.tensor([[T, F, F], [T, T, F], [T, F, T]])  # a root and its two children
    slot_positions = torch.tensor([[0, -1, 2, -1, 1, -1], [-1, -1, -1, 0, -1, -1]])
    slots = torch.tensor([[1, 3, 5], [0, 1, 2]])
    before = slot_positions.clone()
    assert hydra.visible_slots(slot_positions, slots, mask).tolist() == [
        [[T, T, T, F, T, F], [T, T, T, T, T, F], [T, T, T, F, T, T]],
        [[T, F, F, T, F, F], [T, T, F, T, F, F], [T, F, T, T, F, F]]]
    assert torch.equal(slot_positions, before)


def test_tree_attention_within_window_counts_positions_not_slots():
    T, F = True, False
    mask = torch.tensor([[T, F, F], [T, T, F], [T, F, T]])
    slot_positions = torch.tensor([[0, -1, 3, -1, 1, 2, -1]])  # the tree is in slots 1, 3 and 6
    slots, positions = torch.tensor([[1, 3, 6]]), torch.tensor([[4, 5, 5]])
    seen = hydra.visible_slots(slot_positions, slots, mask)
    before = slot_positions.clone(), seen.clone()
    windows = {window: hydra.within_window(seen, slot_positions, slots, positions, window).tolist()
               for window in (1, 2, 3, 5, 6)}
    assert windows[1] == [[[F, T, F, F, F, F, F], [F, F, F, T, F, F, F], [F, F, F, F, F, F, T]]]
    assert windows[2] == [[[F, T, T, F, F, F, F], [F, T, F, T, F, F, F], [F, T, F, F, F, F, T]]]
    assert windows[3] == [[[F, T, T, F, F, T, F], [F, T, T, T, F, F, F], [F, T, T, F, F, F, T]]]
    assert windows[5] == [[[T, T, T, F, T, T, F], [F, T, T, T, T, T, F], [F, T, T, F, T, T, T]]]
    assert windows[6] == seen.tolist()
    assert torch.equal(slot_positions, before[0]) and torch.equal(seen, before[1])


def test_tree_attention_within_window_has_a_place_for_each_row():
    """Rows of other lengths in other slots: a slow loop over tokens and slots says who is near."""
    torch.manual_seed(0)
    positions_of = torch.stack([torch.randperm(12) for _ in range(5)])
    length = torch.tensor([9, 0, 4, 7, 1])
    slot_positions = torch.where(positions_of < length[:, None], positions_of, -1)
    slots = (slot_positions < 0).int().argsort(dim=1, descending=True, stable=True)[:, :3]
    positions = length[:, None] + torch.tensor([0, 1, 1])
    seen = hydra.visible_slots(slot_positions, slots, torch.tensor(
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool())
    got = hydra.within_window(seen, slot_positions, slots, positions, 4)
    for row, token, slot in itertools.product(range(5), range(3), range(12)):
        own = slots[row].tolist()
        at = positions[row, own.index(slot)] if slot in own else slot_positions[row, slot]
        near = positions[row, token] - at < 4
        assert got[row, token, slot] == (seen[row, token, slot] and near)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tree_attention_additive_mask_is_zero_or_the_most_negative_number(dtype):
    visible = torch.tensor([[[True, False, True], [False, True, True]]])
    least = torch.finfo(dtype).min
    got = hydra.additive_mask(visible, dtype)
    assert got.dtype == dtype and got.tolist() == [[[[0, least, 0], [least, 0, 0]]]]


@torch.inference_mode()
@pytest.mark.parametrize("name", [*BASES, *SLIDING_BASES])
def test_tree_attention_gives_each_node_the_logits_of_its_path_alone(name):
    model, prompts, choices = base(name), random_prompts(3, WINDOW + 5, 1, 7), random_choices(3)
    heads = make_heads("hydra++", model)
    decoder, _ = decoder_after_prompt(model, heads, choices, prompts)
    tokens, tree = torch.randint(VOCAB, (3, 16)), decoder.tree
    out, hidden = decoder.forward(model, tokens, decoder.length[:, None] + tree.depths, tree.mask)
    for row, node in itertools.product(range(3), range(16)):
        path = [tokens[row, other].item() for other in [0, *ancestors(choices, node)]]
        alone = model(torch.tensor([[*prompts[row], *path]]), output_hidden_states=True)
        prefix = heads.read_prefix(alone.hidden_states[-1])
        assert_close(out.logits[row, node], alone.logits[0, -1], atol=1e-3, rtol=1e-3)
        assert_close(hidden[row, node], prefix[0, -1], atol=1e-3, rtol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("name", SLIDING_BASES)
def test_tree_attention_of_the_prefix_layer_is_that_of_training(name):
    """A window is the base's own: what the heads see in decoding is what they learnt from."""
    model, (prompt,) = base(name), random_prompts(4, 2 * WINDOW)
    heads = make_heads("hydra++", model)
    decoder, _ = decoder_after_prompt(model, heads, [], [prompt])
    text = torch.tensor([[*prompt, 3, 1]])
    trained = heads.read_prefix(model(text, output_hidden_states=True).hidden_states[-1])
    chain = torch.ones(2, 2).tril().bool()
    positions = torch.tensor([[2 * WINDOW, 2 * WINDOW + 1]])
    _, hidden = decoder.forward(model, text[:, -2:], positions, chain)
    assert_close(hidden, trained[:, -2:], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------- 4 drafting

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_drafting_draft_tree_equals_one_call_for_each_node(kind, seed):
    model = base("llama")
    heads, choices = make_heads(kind, model, seed), random_choices(seed, size=20)
    tree, embed = hydra.build_tree(choices), model.get_input_embeddings()
    root, hidden = torch.randint(VOCAB, (3,)), torch.randn(3, WIDTH)
    got = hydra.draft_tree(heads, tree, root, hidden, embed)
    assert got.shape == (3, 20) and torch.equal(got[:, 0], root)
    for row, node in itertools.product(range(3), range(1, 20)):
        *line, _ = ancestors(choices, node)
        path = got[row, [0, *line]]  # the true drafts of its ancestors, checked before it
        logits = heads(len(line), hidden[row][None, None], embed(path)[None, None])[0, 0]
        assert got[row, node] == logits.argsort(descending=True)[tree.choices[node - 1][-1]]


def test_drafting_draft_tree_calls_a_head_once_for_each_level():
    model, calls = base("llama"), []
    heads = make_heads("hydra", model)
    heads.register_forward_hook(lambda _, args, out: calls.append((args[0], out.shape[1])))
    tree = hydra.build_tree([[0], [2], [4], [2, 0], [4, 1], [4, 3], [4, 3, 0]])
    hydra.draft_tree(heads, tree, torch.tensor([5]), torch.randn(1, WIDTH),
                     model.get_input_embeddings())
    assert calls == [(0, 1), (1, 3), (2, 3)]  # all paths of a level at once


def test_drafting_draft_tree_of_the_root_alone():
    root = torch.tensor([7, 8])
    tree = hydra.build_tree([])
    assert hydra.draft_tree(None, tree, root, torch.zeros(2, WIDTH), None).tolist() == [[7], [8]]


# -------------------------------------------------------------------------------- 5 acceptance

def best_path_slow(passes, choices, scores=None):
    """One row: the longest path that passes; then the largest sum of scores; then the first."""
    best, best_value = 0, (0, 0.0)
    for node in range(len(choices) + 1):
        line = ancestors(choices, node)
        value = len(line), sum(scores[other] for other in line) if scores else 0.0
        if all(passes[other] for other in line) and value > best_value:
            best, best_value = node, value
    return best


@pytest.mark.parametrize("seed", range(6))
def test_acceptance_longest_accepted_path_equals_brute_force(seed):
    torch.manual_seed(seed)
    choices = random_choices(seed, size=14, depth=4, ranks=4)
    tree, passes = hydra.build_tree(choices), torch.rand(60, 14) < 0.7
    passes[:, 0] = torch.rand(60) < 0.5  # the root is accepted whatever is said of it
    score = -torch.rand(60, 14)
    score[:, 0] = -torch.inf             # and its own score is nothing to the paths below it
    plain = hydra.longest_accepted_path(passes, tree).tolist()
    scored = hydra.longest_accepted_path(passes, tree, score=score).tolist()
    assert plain == [best_path_slow(row, choices) for row in passes.tolist()]
    assert scored == [best_path_slow(row, choices, scores)
                      for row, scores in zip(passes.tolist(), score.tolist())]


def one_hot_logits(wanted):
    return 5.0 * F.one_hot(torch.tensor([wanted]), 10).float()


@pytest.mark.parametrize("wanted, node, bonus", [
    ([3, 1, 0, 0, 0, 0, 0], 0, 3), ([1, 4, 0, 0, 0, 0, 0], 1, 4), ([1, 3, 0, 6, 0, 0, 8], 6, 8),
    ([1, 5, 0, 0, 9, 0, 0], 4, 9), ([2, 3, 4, 6, 0, 7, 0], 5, 7), ([2, 3, 9, 6, 0, 0, 0], 2, 9)])
def test_acceptance_accept_greedy_running_example(wanted, node, bonus):
    tokens = torch.tensor([[0, 1, 2, 3, 5, 4, 6]])
    got = hydra.accept_greedy(tokens, one_hot_logits(wanted), hydra.build_tree(SEVEN))
    assert (got[0].tolist(), got[1].tolist()) == ([node], [bonus])


def test_acceptance_accept_greedy_equals_a_walk_down_the_tree():
    torch.manual_seed(0)
    choices = random_choices(1, size=14, ranks=4)
    tree, logits = hydra.build_tree(choices), torch.randn(200, 14, 4)
    tokens = torch.tensor([0] + [choice[-1] for choice in tree.choices]).repeat(200, 1)
    node, bonus = hydra.accept_greedy(tokens, logits, tree)
    for row in range(200):
        here = ()
        while [*here, logits[row, place(tree, here)].argmax().item()] in tree.choices:
            here = (*here, logits[row, place(tree, here)].argmax().item())
        assert node[row] == place(tree, here) and bonus[row] == logits[row, node[row]].argmax()
    assert set(tree.depths[node].tolist()) == {0, 1, 2, 3, 4}


def place(tree, choice):
    """The node of a choice."""
    return tree.choices.index(list(choice)) + 1 if choice else 0


PEAKED = 1 - 0.085, 0.085                           # H 0.29: delta exp(-H) 0.22, epsilon 0.09
FLAT = 0.01, *[0.99 / 15] * 15                      # H 2.74: delta exp(-H) 0.019, epsilon 0.09


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("probs, token, passes", [
    (PEAKED, 1, False),                             # epsilon rules: 0.085 is below 0.09
    ((1 - 0.095, 0.095), 1, True),                  # and 0.095 is above it, though below delta's
    (PEAKED, 0, True),
    (FLAT, 0, False),                               # delta rules: 0.01 is below 0.019
    (FLAT, 5, True),                                # and 0.066 is above it, though below epsilon
])
def test_acceptance_accept_typical_between_the_thresholds(probs, token, passes, temperature):
    logits = temperature * torch.tensor(probs).log().expand(1, 2, -1)
    node, bonus = hydra.accept_typical(torch.tensor([[0, token]]), logits, hydra.build_tree([[0]]),
                                       temperature=temperature)
    assert (node.tolist(), bonus.tolist()) == ([int(passes)], [logits[0, 0].argmax().item()])


def typical_slow(tokens, logits, choices, temperature, epsilon, delta):
    """One row, node by node, straight from the formula."""
    passes, scores = [True], [0.0]
    for node in range(1, len(choices) + 1):
        parent = ([0] + ancestors(choices, node))[-2]
        p = torch.softmax(logits[parent].double() / temperature, -1)
        entropy = -(p * torch.log(p + 1e-5)).sum()
        passes.append(bool(p[tokens[node]] > min(epsilon, delta * torch.exp(-entropy))))
        scores.append(p[tokens[node]].log().item())
    node = best_path_slow(passes, choices, scores)
    return node, logits[node].argmax().item()


@pytest.mark.parametrize("epsilon, delta", [(0.09, 0.3), (0.5, 0.9), (0.02, 0.3)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_acceptance_accept_typical_equals_the_formula(temperature, epsilon, delta):
    torch.manual_seed(0)
    choices = random_choices(2, size=14, ranks=5)
    tree, rows = hydra.build_tree(choices), 60
    logits = 4 * torch.rand(rows, 14, 1) * torch.randn(rows, 14, 8)  # from flat to peaked
    guesses = logits.argsort(descending=True)
    tokens = torch.zeros(rows, 14, dtype=torch.long)
    for node in range(1, 14):
        tokens[:, node] = guesses[:, tree.parents[node], tree.ranks[node]]
    got = hydra.accept_typical(tokens, logits, tree, temperature, epsilon=epsilon, delta=delta)
    slow = [typical_slow(*row, choices, temperature, epsilon, delta)
            for row in zip(tokens.tolist(), logits)]
    assert list(zip(*(part.tolist() for part in got))) == slow
    assert len({node for node, _ in slow}) > 2


def test_acceptance_accept_typical_prefers_the_likeliest_of_the_longest_paths():
    tree = hydra.build_tree([[0], [1], [0, 0], [1, 0]])  # two paths of depth 2
    probs = torch.tensor([[0.05, 0.35, 0.6], [0.2, 0.7, 0.1], [0.15, 0.25, 0.6],
                          [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    # 0.35 * 0.7 = 0.245 loses to 0.6 * 0.6 = 0.36, though its last token is the likelier one
    tokens = torch.tensor([[0, 1, 2, 1, 2]])
    node, bonus = hydra.accept_typical(tokens, probs.log()[None], tree, 1.0)
    assert (node.tolist(), bonus.tolist()) == ([4], [1])
    # the root was chosen at the step before: that it has no chance here must not matter
    probs[0] = torch.tensor([0.0, 0.4, 0.6])
    node, _ = hydra.accept_typical(tokens, probs.log()[None], tree, 1.0)
    assert node.tolist() == [4]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_acceptance_accept_sampling_draws_what_plain_sampling_draws(temperature):
    """One step has finitely many outcomes, (node, bonus token): compare all their frequencies."""
    torch.manual_seed(0)
    vocab, rows, choices = 5, 40_000, [[0], [2], [0, 1], [2, 0], [2, 3], [2, 0, 1]]
    tree, logits = hydra.build_tree(choices), torch.randn(7, vocab)
    tokens = torch.tensor([0] + [choice[-1] for choice in choices])  # siblings distinct
    probs = torch.softmax(logits.double() / temperature, -1)
    chance = torch.zeros(7, vocab, dtype=torch.float64)
    for node in range(7):
        line = [0, *ancestors(choices, node)]
        chance[node] = probs[node]
        for parent, child in zip(line, line[1:]):
            chance[node] *= probs[parent, tokens[child]]
        children = [child for child in range(1, 7) if ancestors(choices, child)[:-1] == line[1:]]
        chance[node, tokens[children]] = 0  # a draw that is a child's token leads on to the child
    assert_close(chance.sum().item(), 1.0)
    node, bonus = hydra.accept_sampling(tokens.expand(rows, -1), logits.expand(rows, -1, -1), tree,
                                        temperature)
    assert_distributed(node * vocab + bonus, chance.flatten())


def test_acceptance_choose_acceptance_at_the_bounds_of_its_settings():
    hydra.choose_acceptance("typical", 1e-5, 1, 1)
    for temperature in (1e-6, 1e5):
        with pytest.raises(ValueError, match="temperature"):
            hydra.choose_acceptance("typical", temperature, 1, 1)


def test_acceptance_accept_typical_asks_for_more_than_the_threshold():
    tree, tokens = hydra.build_tree([[0]]), torch.tensor([[0, 1]])
    node, _ = hydra.accept_typical(tokens, torch.zeros(1, 2, 2), tree, 1.0, epsilon=0.5, delta=1.0)
    assert node.tolist() == [0]  # 0.5 is not more than 0.5


def test_acceptance_accept_typical_compares_in_float32():
    tree, tokens = hydra.build_tree([[0]]), torch.tensor([[0, 1]])
    logits = torch.tensor([0.0, -3.0]).bfloat16().expand(1, 2, 2)
    p = logits[0, 0].float().softmax(-1)[1].item()
    for epsilon, node in ((p * 0.9999, 1), (p * 1.0001, 0)):
        got, _ = hydra.accept_typical(tokens, logits, tree, 1.0, epsilon=epsilon, delta=0.9)
        assert got.tolist() == [node]


def test_acceptance_accept_sampling_draws_in_float32():
    torch.manual_seed(0)
    logits = torch.zeros(4_000_000, 1, 2, dtype=torch.bfloat16)  # ties would be the first token's
    tokens = torch.zeros(4_000_000, 1, dtype=torch.long)
    _, drawn = hydra.accept_sampling(tokens, logits, hydra.build_tree([]), 1.0)
    assert_distributed(drawn, torch.tensor([0.5, 0.5]))


# ---------------------------------------------------------------------------------- 6 KV cache

def test_kv_cache_commit_path_running_example():
    """The picture in its docstring: sat, on and a of the tree in slots 2 to 8 keep 2, 3 and 4."""
    slot_positions = torch.tensor([[0, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]])
    slots, positions = torch.arange(2, 9)[None], torch.tensor([[2, 3, 3, 4, 4, 4, 5]])
    kept = torch.tensor([[True, True, False, False, True, False, False]])
    hydra.commit_path(slot_positions, slots, positions, kept)
    assert slot_positions.tolist() == [[0, 1, 2, 3, -1, -1, 4, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("seed", range(6))
def test_kv_cache_commit_path_equals_a_loop_over_rows_and_slots(seed):
    torch.manual_seed(seed)
    rows, num_slots, nodes = 5, 20, 3 * seed + 1
    order = torch.rand(rows, num_slots).argsort(1)
    slots, others = order[:, :nodes], order[:, nodes:]
    slot_positions = torch.full((rows, num_slots), -1)
    slot_positions.scatter_(1, others, torch.randint(-1, 50, others.shape))
    positions, kept = torch.randint(50, 90, (rows, nodes)), torch.rand(rows, nodes) < 0.5
    expected = slot_positions.tolist()
    for row, node in itertools.product(range(rows), range(nodes)):
        if kept[row, node]:
            expected[row][slots[row, node]] = positions[row, node].item()
    given = [tensor.clone() for tensor in (slots, positions, kept)]
    hydra.commit_path(slot_positions, slots, positions, kept)
    assert slot_positions.tolist() == expected  # in place, and other slots as they were
    assert all(map(torch.equal, given, (slots, positions, kept)))


def cache_with(slot_positions):
    cache = hydra.TreeCache(len(slot_positions), len(slot_positions[0]), "cpu")
    assert cache.slot_positions.unique().tolist() == [-1]  # at first all slots are free
    cache.slot_positions.copy_(torch.tensor(slot_positions))
    return cache


def test_kv_cache_gives_the_first_free_slots_in_order():
    cache = cache_with([[0, -1, 1, -1, -1, -1], [-1, -1, -1, -1, -1, -1], [2, 0, 1, -1, 3, -1]])
    cache.choose_free_slots(2)
    assert cache.slots.tolist() == [[1, 3], [0, 1], [3, 5]]


def test_kv_cache_next_tree_takes_the_slots_of_the_picture():
    cache = cache_with([[0, 1, 2, 3, -1, -1, 4, -1, -1, -1, -1, -1]])
    cache.choose_free_slots(7)
    assert cache.slots.tolist() == [[4, 5, 7, 8, 9, 10, 11]]


def test_kv_cache_gives_slots_that_are_read_only():
    cache = cache_with([[0, -1, 1, -1, -1, -1]])
    cache.slots_read = 4
    cache.choose_free_slots(2)
    key = torch.ones(1, 1, 2, 3)
    assert cache.slots.tolist() == [[1, 3]]
    assert cache.update(key, key, 0)[0].shape == (1, 1, 4, 3)
    assert cache.keys[0].shape == (1, 1, 6, 3)


def test_kv_cache_writes_at_its_slots():
    cache = hydra.TreeCache(2, 10, "cpu")
    cache.slots = torch.tensor([[0, 1], [4, 3]])
    key, value = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 5, dtype=torch.float64)
    keys, values = cache.update(key, value, 7, dict(more=1), further=2)
    assert (keys.shape, values.shape) == ((2, 3, 10, 4), (2, 3, 10, 5))
    assert (keys.dtype, values.dtype) == (torch.float32, torch.float64)
    assert torch.equal(keys[0, :, :2], key[0]) and torch.equal(values[1, :, [4, 3]], value[1])
    assert keys.count_nonzero() == key.numel()    # what was never written is zero
    cache.slots = torch.tensor([[2, 3], [5, 6]])  # a later write keeps the earlier one
    keys, _ = cache.update(key + 1, value, 7)
    assert torch.equal(keys[0, :, :4], torch.cat([key[0], key[0] + 1], 1))


def test_kv_cache_has_tensors_for_every_layer():
    """Layers may differ in heads, width and dtype; each is found under its own number."""
    cache = hydra.TreeCache(2, 4, "cpu")
    cache.slots = torch.tensor([[0], [2]])
    new = [torch.full((2, 1 + layer % 2, 1, 3 + layer), layer + 1.0, dtype=dtype)
           for layer, dtype in enumerate([torch.float32, torch.float64, torch.bfloat16])]
    for layer in (2, 0, 1):
        cache.update(new[layer], -new[layer], layer)
    for layer, each in enumerate(new):
        for own, sign in ((cache.keys[layer], 1), (cache.values[layer], -1)):
            assert (own.dtype, own.shape[1:]) == (each.dtype, (each.shape[1], 4, 3 + layer))
            written = own[0, :, 0].unique().tolist(), own[1, :, 2].unique().tolist()
            assert written == ([sign * (layer + 1)],) * 2
            assert own[0, :, 1:].count_nonzero() == own[1, :, [0, 1, 3]].count_nonzero() == 0


def kept(decoder, row):
    """Keys and values (H, T, Dh) of a row's committed tokens in the order of their positions."""
    cache = decoder.cache
    positions = cache.slot_positions[row]
    order = positions.argsort()[(positions < 0).sum():]
    assert positions[order].tolist() == list(range(decoder.length[row]))
    return [(cache.keys[layer][row][:, order], cache.values[layer][row][:, order])
            for layer in sorted(cache.keys)]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "opt", "gpt-neox", "gemma3-sliding"])
def test_kv_cache_after_commits_equals_a_fresh_prefill(name):
    """All layers, the prefix layer among them; the rows accept different numbers of drafts."""
    model, prompts, choices = base(name), random_prompts(5, 6, 1, 9), random_choices(5)
    heads = scripted_heads("hydra++", model, prompts, choices)
    decoder, (new, _) = decoder_after_prompt(model, heads, choices, prompts)
    texts = [[*prompt, token.item()] for prompt, token in zip(prompts, new)]
    accepted = set()
    for _ in range(12):
        tokens, counts = decoder.step()
        accepted |= {count - 1 for count in counts.tolist()}
        for text, row, count in zip(texts, tokens.tolist(), counts.tolist()):
            text += row[:count]
    assert accepted == set(range(NUM_HEADS + 1))
    layers = model.config.num_hidden_layers
    for row, text in enumerate(texts):
        committed = text[:-1]  # the last one is the next root
        assert decoder.length[row] == len(committed) and decoder.root[row] == text[-1]
        fresh, _ = decoder_after_prompt(model, heads, [], [committed])
        theirs = model(torch.tensor([committed]), use_cache=True,
                       past_key_values=transformers.DynamicCache()).past_key_values
        own = kept(decoder, row)
        assert len(own) == len(kept(fresh, 0)) == layers + 1  # the last is the prefix layer's
        for layer, (pair, other) in enumerate(zip(own, kept(fresh, 0))):
            assert_close(pair, other, atol=1e-4, rtol=1e-3)
            if layer < layers:
                other = theirs.layers[layer].keys[0], theirs.layers[layer].values[0]
                assert_close(pair, other, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_kv_cache_never_moves_a_key():
    model, prompts, choices = base("llama-gqa"), random_prompts(6, 6, 1, 9), random_choices(6)
    heads = scripted_heads("hydra++", model, prompts, choices)
    decoder, _ = decoder_after_prompt(model, heads, choices, prompts)
    cache = decoder.cache
    for _ in range(10):
        taken, before = cache.slot_positions >= 0, cache.slot_positions.clone()
        tensors = [*cache.keys.values(), *cache.values.values()]
        copies = [tensor.clone() for tensor in tensors]
        decoder.step()
        assert torch.equal(cache.slot_positions[taken], before[taken])
        for tensor, copied in zip(tensors, copies):
            assert torch.equal(tensor.transpose(1, 2)[taken], copied.transpose(1, 2)[taken])
        assert all(map(torch.Tensor.is_set_to, tensors, [*cache.keys.values(),
                                                         *cache.values.values()]))


@torch.inference_mode()
def test_kv_cache_trees_fill_the_holes_of_the_trees_before():
    """Context and one tree of slots suffice, for what is rejected is free again."""
    model, prompts = base("llama"), random_prompts(8, 6, 1)
    heads = scripted_heads("hydra", model, prompts, SEVEN)
    decoder, _ = decoder_after_prompt(model, heads, SEVEN, prompts)
    assert decoder.cache.slot_positions.shape == (2, LIMIT + 7)
    filled = 0
    while decoder.length.min() < LIMIT:
        before = decoder.cache.slot_positions.clone()
        decoder.step()
        for row, slots in enumerate(decoder.cache.slots.tolist()):
            free = [slot for slot, position in enumerate(before[row].tolist()) if position < 0]
            assert slots == free[:7]
            filled += slots[-1] - slots[0] > 6  # committed slots lie in between
            last = (decoder.cache.slot_positions[row] >= 0).nonzero().max()
            assert last < decoder.length[row] + 7  # so a row of n tokens lies in its first n + N
    assert filled > 20
    assert [len(kept(decoder, row)[0][0][0]) for row in range(2)] == [LIMIT, LIMIT]


# ------------------------------------------------------------------------------- 7 decode loop

def cut_mc_sim():
    return [choice for choice in hydra.MC_SIM_7B_63 if max(choice) < VOCAB - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_decode_loop_greedy_equals_generate(name, kind):
    """Every drafter gives the base's own text, and each gets just the drafts accepted it should."""
    model, prompts, new = base(name), random_prompts(7, 5, 1, 12), 40
    for seed, choices in enumerate([random_choices(11), cut_mc_sim(), [[2], [2, 0], [2, 0, 1]]]):
        ids, mask = pad(prompts, ("left", "right")[seed % 2])
        options = dict(input_ids=ids, attention_mask=mask, tree=choices, max_new_tokens=new,
                       max_context=LIMIT)
        heads = make_heads(kind, model, seed)
        assert_greedy(model, prompts, hydra.generate(model, heads, **options), new)
        for drafter in ("oracle", "varied", "wrong"):
            heads = scripted_heads(kind, model, prompts, choices, drafter, seed)
            output, seen = hydra.generate(model, heads, **options), set()
            tied = assert_greedy(model, prompts, output, new)
            for row in set(range(3)) - set(tied):
                steps = heads.accepted(row, new)
                assert [count - 1 for count in output.emitted[row]] == steps
                seen |= set(steps)
            depth = max(map(len, choices))
            assert seen == dict(oracle={depth}, wrong={0}, varied=set(range(depth + 1)))[drafter]


def committed_kv(model, heads, text):
    """Keys and values that the base and the prefix layer compute for a text, by layer."""
    ids, caches = torch.tensor([text]), [transformers.DynamicCache() for _ in range(2)]
    out = model(ids, past_key_values=caches[0], use_cache=True, output_hidden_states=True)
    heads.read_prefix(out.hidden_states[-1], past_key_values=caches[1], use_cache=True)
    layers = [*caches[0].layers, *caches[1].layers[len(caches[0].layers):]]
    return [(layer.keys[0], layer.values[0]) for layer in layers]


@torch.inference_mode()
@pytest.mark.parametrize("case", range(int(os.environ.get("HYDRA_FUZZ_CASES", 60))))
def test_decode_loop_fuzz_in_float64(case, monkeypatch):
    """Random base, heads, tree, batch, padding, prompts up to the last place, EOS and limits."""
    chance = random.Random(f"{os.environ.get('HYDRA_FUZZ_SEED', 0)} {case}")
    experts = "mixtral", "mixtral-sliding", "qwen3-moe-sliding", "gpt-oss-sliding"
    names = {*BASES, *SLIDING_BASES}.difference(experts)  # which have no float64
    model = base(chance.choice(sorted(names)), torch.float64)
    kind, limit = chance.choice(list(KINDS)), chance.choice([12, 24, 48, LIMIT])
    lengths = [chance.choice([1, 2, 9, limit // 2, limit - 9, limit - 1])
               for _ in range(chance.randint(1, 3))]
    prompts = random_prompts(chance.random(), *lengths)
    choices = random_choices(chance.random(), chance.randint(1, 40))
    drafter = chance.choice([None, "oracle", "varied", "varied", "wrong"])
    heads = (scripted_heads(kind, model, prompts, choices, drafter, case, limit) if drafter
             else make_heads(kind, model, case))
    tree = hydra.build_tree(choices)
    decoder = hydra.Decoder(model, heads, tree, len(prompts), limit)
    monkeypatch.setattr(hydra, "CHUNK", chance.choice([1, 4, 11, 512]))
    new, eos = chance.randrange(1, limit), chance.sample(range(VOCAB), chance.randrange(3))
    ids, mask = pad(prompts, chance.choice(["left", "right"]))
    output = hydra.decode(decoder, ids, attention_mask=mask, pad_token_id=31, max_new_tokens=new,
                          eos_token_id=eos)
    assert torch.equal(output.sequences[:, :ids.shape[1]], ids)
    assert assert_greedy(model, prompts, output, new, eos, padding=31, limit=limit) == []
    for row, prompt in enumerate(prompts):
        assert all(1 <= count <= tree.max_depth + 1 for count in output.emitted[row])
        if drafter:
            steps = heads.accepted(row, len(wanted(model, prompt, new, eos, limit)))
            assert [count - 1 for count in output.emitted[row]][:-1] == steps[:-1]
        text = [*prompt, *continuation(model, prompt, limit)][:decoder.length[row]]
        own, fresh = kept(decoder, row), committed_kv(model, heads, text)
        assert_close(own, fresh, atol=1e-6, rtol=1e-6)  # norms are computed in fp32


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decode_loop_stops_where_the_context_ends(name):
    model, prompts = base(name), random_prompts(9, LIMIT - 3, LIMIT - 1, LIMIT - 20, 1)
    heads = scripted_heads("hydra++", model, prompts, SEVEN, "oracle")
    ids, mask = pad(prompts)
    output = hydra.generate(model, heads, ids, attention_mask=mask, tree=SEVEN, max_new_tokens=500)
    assert output.sequences.shape == (4, LIMIT - 1 + LIMIT - 1)
    assert_greedy(model, prompts, output, LIMIT)
    assert output.emitted[1] == []  # prefill's token was the last
    # a context smaller than the model's is kept to just as well
    output = hydra.generate(model, heads, ids[3:, :1], tree=SEVEN, max_context=11)
    assert output.sequences.tolist() == [[*prompts[3], *wanted(model, prompts[3], 10)]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_decode_loop_refuses_a_prompt_that_fills_the_context_in_any_row(side):
    model = base("llama")
    ids, mask = pad(random_prompts(9, 3, LIMIT, 5), side)
    with pytest.raises(ValueError, match=f"{LIMIT} tokens fill a context of {LIMIT}"):
        hydra.generate(model, make_heads("hydra", model), ids, attention_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_loop_stops_at_eos_inside_an_accepted_path(kind):
    model, (prompt,) = base("llama"), random_prompts(13, 6)
    text = continuation(model, prompt)
    chain = [[0] * depth for depth in range(1, 5)]
    heads = scripted_heads(kind, model, [prompt], chain, "oracle")
    for place in range(12):  # every place in a step of five tokens
        if text[place] in text[:place]:
            continue
        for eos in (text[place], [text[place]], (text[-1], text[place])):
            output = hydra.generate(model, heads, torch.tensor([prompt]), tree=chain,
                                    eos_token_id=eos, max_new_tokens=30)
            stop = wanted(model, prompt, 30, eos if isinstance(eos, (list, tuple)) else [eos])
            assert output.sequences.tolist() == [[*prompt, *stop]]
            assert output.emitted == [[5] * -(-(len(stop) - 1) // 5)]


def test_decode_loop_rows_finish_one_by_one():
    model, prompts = base("qwen2"), random_prompts(15, 4, 7, 2, 5)
    heads = scripted_heads("hydra", model, prompts, SEVEN)
    eos = [continuation(model, prompts[0])[3], continuation(model, prompts[1])[17]]
    lengths = {len(wanted(model, prompt, 60, eos)) for prompt in prompts}
    assert len(lengths) > 2
    outputs = []
    for side in ("left", "right"):
        ids, mask = pad(prompts, side)
        for kind_of_mask in (mask, mask.bool(), mask.float()):
            outputs.append(hydra.generate(
                model, heads, ids, attention_mask=kind_of_mask, tree=SEVEN, max_new_tokens=60,
                eos_token_id=eos, pad_token_id=9))
            assert_greedy(model, prompts, outputs[-1], 60, eos, padding=9)
    new = [output.sequences[:, 7:] for output in outputs]
    assert all(torch.equal(new[0], other) for other in new[1:])
    assert all(output.emitted == outputs[0].emitted for output in outputs)
    plain = hydra.generate_plain(model, ids, attention_mask=mask, max_new_tokens=60,
                                 eos_token_id=eos)
    assert_greedy(model, prompts, plain, 60, eos, padding=eos[0])  # where no pad is named
    steps = [count for row in outputs[0].emitted for count in row]
    assert outputs[0].tokens_per_step == sum(steps) / len(steps) > 1


@pytest.fixture
def configured():
    """A base that its own generation_config tells where to stop and how to pad."""
    model = copy.deepcopy(base("llama"))
    prompts = random_prompts(15, 4, 7, 2)
    eos = [continuation(model, prompts[0])[3], continuation(model, prompts[1])[17]]
    return model, prompts, eos


@pytest.mark.parametrize("where", ["generate", "decode", "plain"])
@pytest.mark.parametrize("several", [False, True])
def test_decode_loop_ends_where_the_models_own_configuration_says(configured, several, where):
    model, prompts, eos = configured
    eos = eos[:1 + several]
    model.generation_config.eos_token_id = eos if several else eos[0]
    ids, mask = pad(prompts)
    heads = make_heads("hydra", model)
    decoder = hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 3, LIMIT)
    run = dict(generate=partial(hydra.generate, model, heads, tree=SEVEN),
               decode=partial(hydra.decode, decoder), plain=partial(hydra.generate_plain, model))
    for options, ends in ((dict(), eos), (dict(eos_token_id="model"), eos),
                          (dict(eos_token_id=None), []), (dict(eos_token_id=eos[0] + 1),
                                                          [eos[0] + 1])):
        output = run[where](input_ids=ids, attention_mask=mask, max_new_tokens=40, pad_token_id=9,
                            **options)
        assert output.new_tokens == [wanted(model, prompt, 40, ends) for prompt in prompts]


@pytest.mark.parametrize("asked, own, eos, padding", [
    (9, 8, True, 9), (0, 8, True, 0), (None, 8, True, 8), (None, 0, True, 0),
    (None, None, True, "eos"), (None, 7, False, 7), (None, None, False, 0)])
def test_decode_loop_pads_with_what_is_asked_for_or_the_models_own(configured, asked, own, eos,
                                                                   padding):
    model, prompts, ends = configured
    model.generation_config.pad_token_id = own
    ids, mask = pad([*prompts, (1,) * (LIMIT - 3)])  # a row that the context ends early
    output = hydra.generate_plain(model, ids, attention_mask=mask, max_new_tokens=20,
                                  pad_token_id=asked, eos_token_id=ends if eos else None)
    assert set(output.sequences[3, LIMIT:].tolist()) == {ends[0] if padding == "eos" else padding}


@pytest.mark.parametrize("max_new_tokens, steps", [(1, 0), (2, 1)])
def test_decode_loop_few_new_tokens(max_new_tokens, steps):
    model, prompts = base("llama"), random_prompts(17, 3, 3)
    ids, _ = pad(prompts)
    output = hydra.generate(model, make_heads("hydra", model), ids, max_new_tokens=max_new_tokens)
    assert output.sequences.shape == (2, 3 + max_new_tokens)
    assert_greedy(model, prompts, output, max_new_tokens)
    assert [len(row) for row in output.emitted] == [steps, steps]


def test_decode_loop_default_tree_and_plain_decoding():
    model, prompts = base("llama"), random_prompts(19, 3)
    ids, _ = pad(prompts)
    heads = make_heads("hydra", model)
    assert hydra.choose_tree(heads, None).choices == hydra.build_tree(hydra.MC_SIM_7B_63).choices
    published, own = (hydra.generate(model, heads, ids, tree=tree, max_new_tokens=40)
                      for tree in (hydra.MC_SIM_7B_63, SEVEN))
    assert hydra.generate(model, heads, ids, max_new_tokens=40).emitted == published.emitted
    assert hydra.generate(model, heads, ids, tree=hydra.build_tree(SEVEN),
                          max_new_tokens=40).emitted == own.emitted != published.emitted
    heads.choices = SEVEN
    assert hydra.generate(model, heads, ids, max_new_tokens=40).emitted == own.emitted
    plain = hydra.generate_plain(model, ids, max_new_tokens=40)
    assert_greedy(model, prompts, plain, 40)
    assert plain.emitted == [[1] * 39] and plain.tokens_per_step == 1
    shallow = make_heads("hydra", model, num_heads=2)  # cut to what the heads can draft
    assert hydra.choose_tree(shallow, None).choices == [
        choice for choice in hydra.build_tree(hydra.MC_SIM_7B_63).choices if len(choice) <= 2]
    assert_greedy(model, prompts, hydra.generate(model, shallow, ids, max_new_tokens=40), 40)


def test_decode_loop_default_tree_fits_a_small_vocabulary():
    model = base("llama", vocab_size=8)
    heads = make_heads("hydra", model)
    assert hydra.choose_tree(heads, None).choices == [
        choice for choice in hydra.build_tree(hydra.MC_SIM_7B_63).choices if max(choice) < 8]
    hydra.generate(model, heads, torch.ones(1, 3, dtype=torch.long), max_new_tokens=5)


def test_decode_loop_trees_are_taken_as_they_are():
    heads = make_heads("hydra", base("llama"))
    heads.choices = SEVEN
    tree = hydra.build_tree([[0]])
    assert hydra.choose_tree(heads, tree) is hydra.choose_tree(None, tree) is tree
    assert hydra.choose_tree(heads, None).choices == SEVEN
    assert hydra.choose_tree(heads, [[1]]).choices == [[1]]
    assert hydra.choose_tree(heads, []).num_nodes == hydra.choose_tree(None, None).num_nodes == 1


def test_decode_loop_reads_a_long_prompt_in_chunks():
    model = base("llama", max_position_embeddings=1200)
    prompts = random_prompts(21, 1100, 513, 3, 1025, 512)
    ids, mask = pad(prompts, "left")
    heads = make_heads("hydra++", model)
    output = hydra.generate(model, heads, ids, attention_mask=mask, tree=SEVEN, max_new_tokens=12)
    for row, prompt in enumerate(prompts):
        new = continuation(model, prompt, len(prompt) + 12)
        assert output.sequences[row, 1100:].tolist() == new


@pytest.mark.parametrize("kind", KINDS)
def test_decode_loop_uses_a_decoder_again(kind):
    model = base("llama-gqa")
    batches = [random_prompts(seed, *lengths)
               for seed, lengths in enumerate([(9, 3), (1, 1), (2, 8)])]
    heads = scripted_heads(kind, model, sum(batches, []), SEVEN)
    decoder = hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 2, LIMIT)
    for prompts, new in zip(batches, (60, 5, 30)):
        ids, mask = pad(prompts)
        options = dict(attention_mask=mask, max_new_tokens=new)
        again = hydra.decode(decoder, ids, **options)
        fresh = hydra.generate(model, heads, ids, tree=SEVEN, **options)
        assert_greedy(model, prompts, again, new)
        assert torch.equal(again.sequences, fresh.sequences) and again.emitted == fresh.emitted
    with pytest.raises(ValueError, match=f"{LIMIT} tokens fill a context of {LIMIT}"):
        hydra.decode(decoder, torch.ones(2, LIMIT, dtype=torch.long))
    assert torch.equal(hydra.decode(decoder, ids, **options).sequences, fresh.sequences)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_decode_loop_leaves_nothing_behind_after_200_generations():
    model = base("llama", num_hidden_layers=1, max_position_embeddings=64)
    heads, ids = make_heads("hydra++", model), torch.tensor(random_prompts(45, 5, 5))
    decoder = hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 2, 32)
    plain = partial(model.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    text, counted = plain(), []
    for _ in range(4):
        for _ in range(25):
            hydra.decode(decoder, ids, max_new_tokens=4)
            hydra.generate(model, heads, ids, tree=SEVEN, max_new_tokens=4)
        counted.append(live_tensors())
    assert counted == counted[:1] * 4 and torch.equal(plain(), text)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_decode_loop_frees_a_decoder_at_once(device):
    model = base("llama", device=device)
    decoder = hydra.Decoder(model, make_heads("hydra++", model), hydra.build_tree(SEVEN), 1, 40)
    hydra.decode(decoder, torch.ones(1, 5, dtype=torch.long, device=device), max_new_tokens=20)
    still_there = weakref.ref(decoder)
    del decoder
    assert not still_there()


class Recorder:
    """A streamer that writes down what it is given."""

    def __init__(self):
        self.heard, self.ended = [], 0

    def put(self, tokens):
        self.heard.append(tokens.flatten().tolist())

    def end(self):
        self.ended += 1


def test_decode_loop_streams_the_prompt_then_every_new_token():
    model, (prompt,) = base("llama"), random_prompts(23, 6)
    heads = scripted_heads("hydra", model, [prompt], SEVEN)
    eos = continuation(model, prompt)[17]
    for options in (dict(max_new_tokens=23), dict(max_new_tokens=50, eos_token_id=eos)):
        recorder = Recorder()
        output = hydra.generate(model, heads, torch.tensor([prompt]), tree=SEVEN,
                                streamer=recorder, **options)
        assert recorder.heard[0] == list(prompt) and recorder.ended == 1
        assert sum(recorder.heard, []) == output.sequences[0].tolist()
        assert len(recorder.heard) == 2 + len(output.emitted[0])  # it hears each step at once


def test_decode_loop_leaves_the_base_as_it_was():
    model, (prompt,) = base("llama-gqa"), random_prompts(25, 6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config, ids = model.config.to_dict(), torch.tensor([prompt])
    hydra.generate(model, make_heads("hydra++", model), ids, max_new_tokens=9)
    assert model.config.to_dict() == config and not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          max_new_tokens=20, pad_token_id=0, eos_token_id=None)
    assert text[0, 6:].tolist() == continuation(model, prompt)[:20]


@pytest.mark.parametrize("name, kind", [("llama", "hydra"), ("llama", "hydra++"),
                                        ("granite", "hydra++")])
def test_decode_loop_sampling_has_the_distribution_of_plain_sampling(name, kind):
    """Two ragged prompts, three new tokens: all 64 texts, their exact chances from the base."""
    model = base(name, vocab_size=4, initializer_range=0.15)
    heads, chain = make_heads(kind, model), [[0], [1], [0, 0], [0, 2], [1, 1]]
    prompts, rows, temperature = [(1, 3, 0, 2), (2,)], 3000, 0.8
    ids, mask = (x.repeat_interleave(rows, 0) for x in pad(prompts, "left"))
    torch.manual_seed(0)
    output = hydra.generate(model, heads, ids, attention_mask=mask, tree=chain, accept="sampling",
                            temperature=temperature, max_new_tokens=3)
    assert {count for row in output.emitted for count in row} == {1, 2, 3}
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    for k, prompt in enumerate(prompts):
        whole = torch.cat([torch.tensor([prompt]).expand(64, -1), texts], 1)
        logits = model(whole).logits[:, len(prompt) - 1:-1]
        chances = (logits.double() / temperature).log_softmax(-1).gather(2, texts[..., None])
        new = output.sequences[k * rows:(k + 1) * rows, 4:]
        assert_distributed(new @ torch.tensor([16, 4, 1]), chances.sum((1, 2)).exp())


@pytest.mark.parametrize("accept", ["greedy", "typical", "sampling"])
def test_decode_loop_temperature_zero_is_greedy(accept):
    model, prompts = base("llama"), random_prompts(27, 3)
    output = hydra.generate(model, make_heads("hydra", model), pad(prompts)[0], accept=accept,
                            temperature=0, max_new_tokens=30)
    assert_greedy(model, prompts, output, 30)


def test_decode_loop_hands_the_settings_to_the_rule(monkeypatch):
    model, heard = base("llama"), []
    greedy = hydra.accept_greedy

    def rule(tokens, logits, tree, **settings):
        heard.append(settings)
        return greedy(tokens, logits, tree)

    monkeypatch.setattr(hydra, "accept_typical", rule)
    monkeypatch.setattr(hydra, "accept_sampling", rule)
    for accept in ("typical", "sampling"):
        hydra.generate_plain(model, torch.tensor([[1, 2]]), accept=accept, temperature=0.7,
                             epsilon=0.2, delta=0.6, max_new_tokens=1)
    assert heard == [dict(temperature=0.7, epsilon=0.2, delta=0.6), dict(temperature=0.7)]


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_decode_loop_step_compiles_without_a_graph_break(kind):
    model, prompts = base("llama-gqa"), random_prompts(29, 5, 2)
    eager, compiled = (decoder_after_prompt(model, make_heads(kind, model), SEVEN, prompts)[0]
                       for _ in range(2))
    torch._dynamo.reset()
    compiled.run = torch.compile(hydra.Decoder.advance, fullgraph=True, backend="eager")
    for _ in range(4):
        for expected, got in zip(eager.step(), compiled.step()):
            assert torch.equal(expected, got)
    assert torch.equal(eager.length, compiled.length)


@torch.inference_mode()
@pytest.mark.parametrize("accept", ["greedy", "typical", "sampling"])
def test_decode_loop_step_reads_nothing_back(accept):
    """On the meta device tensors have shapes and no values: whatever reads one raises."""
    heads = make_heads("hydra++", base("llama-gqa")).to("meta")
    model = base("llama-gqa", device="meta")
    rule = hydra.choose_acceptance(accept, 1.0, 0.09, 0.3)
    decoder = hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 2, LIMIT, rule)
    decoder.length_bound = 5  # prefill looks at the prompts' lengths, once
    for _ in range(2):
        tokens, counts = decoder.step()
        assert tokens.is_meta and (tokens.shape, counts.shape) == ((2, 4), (2,))


def test_decode_loop_in_bfloat16():
    model, prompts = base("llama-gqa", torch.bfloat16), random_prompts(31, 5, 2)
    ids, mask = pad(prompts)
    output = hydra.generate(model, make_heads("hydra++", model), ids, attention_mask=mask,
                            max_new_tokens=30)
    assert_greedy(model, prompts, output, 30)


@pytest.mark.parametrize("options, message", [
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "empty"),
    (dict(attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])), "empty"),
    (dict(input_ids=torch.zeros(0, 3, dtype=torch.long)), "the prompt is empty"),
    (dict(attention_mask=torch.ones(2, 4)), "same shape"),
    (dict(max_context=0), f"in 1 .. {LIMIT}"),
    (dict(attention_mask=torch.ones(3)), "same shape"),
    (dict(input_ids=torch.ones(3, dtype=torch.long)), "same shape"),
    (dict(input_ids=torch.ones(1, LIMIT + 1, dtype=torch.long)), rf"{LIMIT + 1} tokens.*{LIMIT}"),
    (dict(input_ids=torch.ones(1, LIMIT, dtype=torch.long)), rf"{LIMIT} tokens.*{LIMIT}: shorten"),
    (dict(max_context=2), "3 tokens.*2"), (dict(max_context=LIMIT + 1), f"max_context.*{LIMIT}"),
    (dict(max_context=3), "3 tokens fill a context of 3"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be 1 or more"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1 must be 1 or more"),
    (dict(max_new_tokens=-9), "max_new_tokens=-9 must be 1 or more"),
    (dict(temperature=-0.5), "temperature.*-0.5"),
    (dict(temperature=math.inf), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(epsilon=0), "epsilon"), (dict(epsilon=1.5), "epsilon"), (dict(delta=0.0), "delta"),
    (dict(delta=-1), "delta"), (dict(accept="beam"), "beam"), (dict(tree=[[0], [1, 0]]), "parent"),
    (dict(tree=[[0], [VOCAB]]), f"{VOCAB + 1} guesses.*{VOCAB} tokens"),
    (dict(tree=[[0] * depth for depth in range(1, 6)]), "5 deep.*4 heads"),
    (dict(streamer=Recorder()), "single prompt")])
def test_decode_loop_says_what_is_wrong(options, message):
    model, ids = base("llama"), torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        hydra.generate(model, make_heads("hydra", model), **dict(input_ids=ids) | options)


def test_decode_loop_refuses_heads_of_another_base():
    model, other = base("llama"), base("llama", vocab_size=VOCAB + 8)
    with pytest.raises(ValueError, match=r"\(32, 32\).*\(40, 32\)"):
        hydra.generate(model, make_heads("hydra", other), torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("eos, ids", [
    (3, {3}), ([3], {3}), ((3, 5), {3, 5}), ([], set()), (np.int64(3), {3}),
    (np.array([5, 3]), {3, 5}), (torch.tensor(3), {3}), (torch.tensor([3, 5]), {3, 5}),
    (torch.tensor([[3, 5]]), {3, 5}), (torch.tensor([3], dtype=torch.int32), {3})])
def test_decode_loop_takes_eos_in_any_form(eos, ids):
    model = base("llama")
    output = hydra.generate_plain(model, torch.tensor([[1, 2]]), max_new_tokens=40,
                                  eos_token_id=eos)
    assert output.new_tokens[0] == wanted(model, (1, 2), 40, ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decode_loop_wide_padding_needs_no_more_room(side):
    model = base("llama")
    prompts = random_prompts(3, 10, 4)
    ids = torch.zeros(2, 40, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # 30 columns and more of padding for 5 new tokens
        place = slice(len(prompt)) if side == "right" else slice(40 - len(prompt), 40)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    output = hydra.generate(model, make_heads("hydra++", model), ids, attention_mask=mask,
                            max_new_tokens=5)
    for prompt, row in zip(prompts, output.new_tokens):
        assert row == wanted(model, prompt, 5)


def with_pictures(**changes):
    """A base that reads pictures, too: its text model has a configuration of its own."""
    torch.manual_seed(2)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=dict(model_type="mistral", vocab_size=VOCAB, hidden_size=WIDTH,
                         intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, initializer_range=0.5,
                         max_position_embeddings=LIMIT) | dict(sliding_window=None) | changes,
        vision_config=dict(model_type="clip_vision_model", hidden_size=8, intermediate_size=8,
                           num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4),
        image_token_index=VOCAB - 1)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_decode_loop_reads_the_text_model_of_a_base_with_pictures(kind):
    model, prompts = with_pictures(), [(1, 2, 3), (4, 5, 6, 7, 8)]
    ids, mask = pad(prompts, "left")
    output = hydra.generate(model, make_heads(kind, model), ids, attention_mask=mask,
                            max_new_tokens=40, eos_token_id=None)
    assert_greedy(model, prompts, output, 40)
    with pytest.raises(ValueError, match=f"must lie in 1 .. {LIMIT}"):
        hydra.generate_plain(model, ids, attention_mask=mask, max_context=LIMIT + 1)


def test_decode_loop_reads_the_window_of_a_base_with_pictures():
    model, prompts = with_pictures(sliding_window=WINDOW), random_prompts(5, 3, 15)
    ids, mask = pad(prompts, "left")
    output = hydra.generate(model, make_heads("hydra++", model), ids, attention_mask=mask,
                            max_new_tokens=40, eos_token_id=None)
    assert_greedy(model, prompts, output, 40)


TINY = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=48)
LLAMA_LIKE = TINY | dict(num_hidden_layers=2, num_key_value_heads=2)
UNREADABLE = {
    "alibi": ("FalconConfig", dict(TINY, num_hidden_layers=1, alibi=True), "alibi"),
    "mamba": ("MambaConfig", dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1,
                                  state_size=4), "cannot decode with"),
    "jamba": ("JambaConfig", dict(  # layers with a running state between layers of attention
        LLAMA_LIKE, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        use_mamba_kernels=False), "cannot decode with"),
    "recurrent gemma": ("RecurrentGemmaConfig", dict(
        LLAMA_LIKE, num_hidden_layers=3, lru_width=WIDTH), "cannot decode with"),
    "mpt": ("MptConfig", dict(vocab_size=VOCAB, d_model=WIDTH, n_layers=1, n_heads=4,
                              max_seq_len=64), "position_ids"),  # alibi inside
    "conv": ("Lfm2Config", dict(LLAMA_LIKE, layer_types=["conv", FULL]), "conv"),
    "chunked": ("Llama4TextConfig", dict(LLAMA_LIKE, num_local_experts=2, head_dim=8),
                "chunked_attention"),
    "indexed": ("DeepseekV32Config", dict(LLAMA_LIKE, num_key_value_heads=4),
                "indexed_attention"),  # an indexer keeps a cache of its own
    "sparse": ("BigBirdConfig", dict(TINY, num_hidden_layers=1, is_decoder=True), "at random"),
    "first gpt": ("OpenAIGPTConfig", dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=4),
                  "past_key_values"),  # keeps no cache
    "longrope": ("LlamaConfig", dict(LLAMA_LIKE, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
        original_max_position_embeddings=10)), "window of 10"),
    "doge": ("DogeConfig", dict(LLAMA_LIKE, keep_window_size=10), "window of 10"),
    "gpt-neo": ("GPTNeoConfig", dict(vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, num_heads=4,
                                     attention_types=[[["global", "local"], 1]], window_size=10),
                "window of 10"),
}


@pytest.mark.parametrize("config, settings, message", UNREADABLE.values(), ids=UNREADABLE)
def test_decode_loop_refuses_a_base_that_cannot_read_a_tree(config, settings, message):
    config = getattr(transformers, config)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        hydra.generate_plain(model, torch.ones(1, 4, dtype=torch.long), max_new_tokens=9)


@pytest.mark.parametrize("attention", ["flex_attention"])
def test_decode_loop_refuses_attention_that_takes_no_mask_of_numbers(attention):
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(base("llama").config),
                                                          attn_implementation=attention)
    with pytest.raises(ValueError, match="load it with sdpa attention"):
        hydra.generate_plain(model, torch.ones(1, 4, dtype=torch.long), max_new_tokens=9)


def test_decode_loop_refuses_an_encoder_with_a_decoder():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match="cannot decode with t5"):
        hydra.generate_plain(model, torch.ones(1, 4, dtype=torch.long), max_new_tokens=9)


def test_decode_loop_prefix_layer_keeps_off_the_layers_of_gpt_neo():
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, num_heads=4, window_size=LIMIT * 2,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=LIMIT,
        initializer_range=0.5)).eval()
    prompt = random_prompts(7, 5)[0]
    ids = torch.tensor([prompt])
    output = hydra.generate(model, make_heads("hydra++", model), ids, max_new_tokens=12)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert torch.equal(output.sequences, plain)


def test_decode_loop_outside_of_generate_keeps_no_autograd_graph():
    model = base("llama").requires_grad_(True)
    decoder = hydra.Decoder(model, make_heads("hydra", model), hydra.build_tree([[0]]), 1, 20)
    decoder.prefill(torch.ones(1, 3, dtype=torch.long))
    decoder.step()
    assert not decoder.hidden.requires_grad


@torch.inference_mode()
def test_decode_loop_reads_no_more_slots_than_needed():
    """Attention reads 512, 1024, ... slots, as many as the longest running row needs."""
    model, read = base("llama-gqa", max_position_embeddings=1200, initializer_range=0.3), []
    prompts, heads = random_prompts(41, 240, 90), make_heads("hydra++", base("llama-gqa"))
    decoder = hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 2, 700)
    run = decoder.advance_function

    def recorded(decoder, tree):
        result = run(decoder, tree)
        needed = (decoder.cache.slot_positions >= 0).nonzero()[:, 1].max() + 1
        read.append((decoder.cache.slots_read, int(needed)))
        return result

    decoder.advance_function = recorded
    ids, mask = pad(prompts, "left")
    output = hydra.decode(decoder, ids, attention_mask=mask, max_new_tokens=300)
    assert_greedy(model, prompts, output, 300, limit=700)
    assert sorted({slots for slots, _ in read}) == [512, 707]
    assert all(needed <= slots <= max(512, 2 * needed + 14) for slots, needed in read)


@torch.inference_mode()
def test_decode_loop_stepped_by_hand_knows_how_long_a_row_may_be():
    """Without a look at the counts a row is taken to grow by a whole path in every step."""
    model = base("llama-gqa", max_position_embeddings=1200, initializer_range=0.3)
    decoder = hydra.Decoder(model, make_heads("hydra", model), hydra.build_tree(SEVEN), 2, 700)
    decoder.prefill(torch.ones(2, 3, dtype=torch.long))
    read = [decoder.cache.slots_read for _ in range(150) if decoder.step()]
    assert read == [512] * 126 + [707] * 24  # 3 + 4 * 125 + 7 = 510
    assert decoder.length_bound == 3 + 4 * 150
    decoder.step(100)
    assert (decoder.cache.slots_read, decoder.length_bound) == (512, 104)


@pytest.mark.parametrize("length_bound, context, slots_read", [
    (1, 2000, 512), (505, 2000, 512), (506, 2000, 1024), (1017, 2000, 1024), (1018, 2000, 2007),
    (5, 20, 27), (505, 505, 512), (506, 506, 513)])
def test_decode_loop_slots_read_are_a_power_of_two_or_all(length_bound, context, slots_read):
    model = base("llama", max_position_embeddings=2000)
    decoder = hydra.Decoder(model, make_heads("hydra", model), hydra.build_tree(SEVEN), 1, context)
    decoder.set_slots_read(length_bound)  # and 7 nodes
    assert decoder.cache.slots_read == slots_read


@pytest.fixture
def cuda_graphs(monkeypatch):
    """CUDA graphs for any machine: what is recorded is undone, and happens in replays only.

    Lists (what happened, slots read); decoder says whose steps they are.
    """
    log = SimpleNamespace(recorded=[], replayed=[], decoder=None)

    class Graph:
        def replay(self):
            decoder = log.decoder
            log.replayed.append(decoder.cache.slots_read)
            _, result = decoder.graphs[decoder.cache.slots_read]
            for old, new in zip(result, decoder.advance_function(decoder, decoder.tree)):
                old.copy_(new)

    @contextlib.contextmanager
    def record(graph):
        decoder, cache = log.decoder, log.decoder.cache
        held = [decoder.length, decoder.root, decoder.hidden, cache.slot_positions,
                *cache.keys.values(), *cache.values.values()]
        before = [part.clone() for part in held]
        log.recorded.append(cache.slots_read)
        yield
        for part, old in zip(held, before):
            part.copy_(old)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return log


def test_decode_loop_records_one_graph_for_each_number_of_slots(cuda_graphs):
    model = base("llama-gqa", max_position_embeddings=1200, initializer_range=0.3)
    decoder = hydra.Decoder(model, make_heads("hydra++", model), hydra.build_tree(SEVEN), 2, 700,
                            cuda_graph=True)
    cuda_graphs.decoder = decoder
    for lengths, new in (([505, 9], 2), ([440, 9], 200), ([1, 4], 30), ([513, 512], 60)):
        prompts = random_prompts(47, *lengths)
        ids, mask = pad(prompts, "left")
        output = hydra.decode(decoder, ids, attention_mask=mask, max_new_tokens=new)
        assert_greedy(model, prompts, output, new, limit=700)
        assert cuda_graphs.recorded == [512] or new > 2  # by prefill, for the first step
    assert cuda_graphs.recorded == [512, 707] == list(decoder.graphs)
    assert set(cuda_graphs.replayed) == {512, 707}


@torch.inference_mode()
def test_decode_loop_warms_up_without_a_trace(cuda_graphs):
    """After prefill all is as if no step had been taken to compile or record it."""
    model, prompts = base("llama-gqa"), random_prompts(48, 9, 4)
    heads = scripted_heads("hydra++", model, prompts, SEVEN)
    decoders = [hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 2, LIMIT, cuda_graph=recorded)
                for recorded in (True, False)]
    cuda_graphs.decoder = decoders[0]
    for _ in range(2):  # the second time there is a text before
        results = [decoder.prefill(*pad(prompts)) for decoder in decoders]
        for steps in range(5):
            for name in ("length", "root", "hidden"):
                assert torch.equal(*(getattr(decoder, name) for decoder in decoders))
            assert torch.equal(*(decoder.cache.slot_positions for decoder in decoders))
            for row in range(2):
                assert_close(*(kept(decoder, row) for decoder in decoders))
            assert all(map(torch.equal, *results))
            results = [decoder.step() for decoder in decoders]
    assert cuda_graphs.recorded == [LIMIT + 7]


def test_decode_loop_names_the_option_where_no_graph_can_be_recorded(monkeypatch):
    @contextlib.contextmanager
    def record(graph):
        yield
        raise RuntimeError("it asked the host")

    model, ids = base("llama"), torch.ones(2, 3, dtype=torch.long)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "graph", record)
    with pytest.raises(ValueError, match="no CUDA graph.*--no-cuda-graph: it asked the host"):
        hydra.generate(model, make_heads("hydra", model), ids, cuda_graph=True)


@pytest.mark.parametrize("lengths", [(11,), (3, 11, 1), (4, 8)])
def test_decode_loop_prefill_computes_no_logits(lengths, monkeypatch):
    monkeypatch.setattr(hydra, "CHUNK", 4)
    model, prompts, seen = base("llama-gqa"), random_prompts(67, *lengths), []
    decoder = hydra.Decoder(model, None, hydra.build_tree([]), len(lengths), LIMIT)
    hook = model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    decoder.prefill(*pad(prompts))
    hook.remove()
    assert seen == [(len(lengths), 1, VOCAB)]  # those of the first step


@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
@pytest.mark.parametrize("name", SLIDING_BASES)
def test_decode_loop_greedy_with_a_sliding_window_equals_generate(name, kind):
    """Windows slide over prompt and text, inside the tree and over slots in any order."""
    model, prompts, new = base(name), random_prompts(7, 1, 8, 23), 36
    wide = base(name, sliding_window=LIMIT)
    assert wanted(model, prompts[2], new) != wanted(wide, prompts[2], new)  # it matters here
    ids, mask = pad(prompts, "left")
    heads = scripted_heads(kind, model, prompts, cut_mc_sim())
    output = hydra.generate(model, heads, ids, attention_mask=mask, tree=cut_mc_sim(),
                            max_new_tokens=new)
    tied = assert_greedy(model, prompts, output, new)
    for row in {0, 1, 2}.difference(tied):
        assert [count - 1 for count in output.emitted[row]] == heads.accepted(row, new)
    assert sum(count - 1 for row in output.emitted for count in row) > 50


@pytest.mark.parametrize("chunk", [3, 8, WINDOW, 16])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3-sliding"])
def test_decode_loop_a_window_reaches_over_the_chunks_of_a_prompt(name, chunk, monkeypatch):
    monkeypatch.setattr(hydra, "CHUNK", chunk)
    model, prompts = base(name), random_prompts(8, 40, 5, 29)
    ids, mask = pad(prompts, "left")
    heads = scripted_heads("hydra++", model, prompts, SEVEN)
    output = hydra.generate(model, heads, ids, attention_mask=mask, tree=SEVEN, max_new_tokens=36)
    assert_greedy(model, prompts, output, 36)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3-sliding"])
def test_decode_loop_a_window_reaches_over_no_padding(name, side):
    """Far more columns than slots: positions are counted without padding."""
    model, prompts = base(name), random_prompts(9, 14, 3)
    ids, mask = (x[:2] for x in pad([*prompts, (0,) * 150], side))
    heads = scripted_heads("hydra++", model, prompts, SEVEN)
    output = hydra.generate(model, heads, ids, attention_mask=mask, tree=SEVEN, max_new_tokens=30,
                            max_context=44)
    assert output.new_tokens == [wanted(model, prompt, 30) for prompt in prompts]


def test_decode_loop_takes_a_rule_of_ones_own():
    model = base("llama")
    output = hydra.generate(model, make_heads("hydra", model), torch.tensor([[1, 2]]), tree=SEVEN,
                            max_new_tokens=20, accept=lambda tokens, logits, tree: (
                                torch.full((1,), tree.num_nodes - 1), tokens[:, -1]))
    assert output.emitted[0] == [4] * len(output.emitted[0])  # the last node, three deep


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [
    "llama-gqa", "gpt2", "qwen3", "mistral-sliding", "gemma3-sliding"])
def test_decode_loop_cuda_greedy_equals_generate(name, kind):
    model, prompts = base(name, device="cuda"), random_prompts(33, 5, 1, 12)
    ids, mask = pad(prompts, "left", "cuda")
    for cuda_graph in (True, False):
        output = hydra.generate(model, make_heads(kind, model), ids, attention_mask=mask,
                                max_new_tokens=60, cuda_graph=cuda_graph)
        assert_greedy(model, prompts, output, 60)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_loop_cuda_graph_over_a_long_text(dtype):
    model = base("llama-gqa", dtype, "cuda", max_position_embeddings=300, initializer_range=0.3)
    prompts = random_prompts(35, 120, 40)
    ids, mask = pad(prompts, "left", "cuda")
    output = hydra.generate(model, make_heads("hydra++", model), ids, attention_mask=mask,
                            tree=SEVEN, max_new_tokens=150)
    assert_greedy(model, prompts, output, 150, limit=300)


@needs_cuda
def test_decode_loop_cuda_records_one_graph_for_all_prompts():
    model, graphs = base("llama", device="cuda"), []
    decoder = hydra.Decoder(model, make_heads("hydra++", model), hydra.build_tree(SEVEN), 2, LIMIT)
    for seed, new in ((37, 60), (38, 5), (39, 30)):
        prompts = random_prompts(seed, 9, seed - 30)
        ids, mask = pad(prompts, "left", "cuda")
        output = hydra.decode(decoder, ids, attention_mask=mask, max_new_tokens=new)
        assert_greedy(model, prompts, output, new)
        graphs.append(dict(decoder.graphs))
    assert len(graphs[0]) == 1 and graphs == graphs[:1] * 3


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
def test_decode_loop_cuda_slots_read_change_in_mid_text(compile, dtype):
    model = base("llama-gqa", dtype, "cuda", max_position_embeddings=1200, initializer_range=0.3)
    decoder = hydra.Decoder(model, make_heads("hydra++", model), hydra.build_tree(SEVEN), 2, 1100,
                            compile=compile)
    for seed in (41, 42):  # the second time every graph is there
        prompts = random_prompts(seed, 200, 90)
        ids, mask = pad(prompts, "left", "cuda")
        output = hydra.decode(decoder, ids, attention_mask=mask, max_new_tokens=400)
        assert_greedy(model, prompts, output, 400, limit=1100)
        assert list(decoder.graphs) == [512, 1024]


@needs_cuda
def test_decode_loop_cuda_graph_draws_anew_in_every_replay():
    model = base("llama-gqa", device="cuda", initializer_range=0.05)
    heads, texts = make_heads("hydra", model), []
    ids = torch.ones(4, 3, dtype=torch.long, device="cuda")
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(hydra.generate(model, heads, ids, accept="sampling", tree=SEVEN,
                                    max_new_tokens=64).sequences)
        assert len(set(map(tuple, texts[-1].tolist()))) == 4
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@needs_cuda
@pytest.mark.parametrize("length, new", [(3, 60), (490, 120)])  # 512 slots are read; then all, too
@pytest.mark.parametrize("accept", ["sampling", "greedy"])
def test_decode_loop_cuda_graph_writes_what_steps_without_it_write(accept, length, new):
    model = base("llama-gqa", device="cuda", max_position_embeddings=1200, initializer_range=0.05)
    heads, texts = make_heads("hydra++", model), []
    ids = torch.tensor(random_prompts(54, *[length] * 4), device="cuda")
    for cuda_graph in (True, False, True):
        torch.manual_seed(7)
        decoder = hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 4, 700,
                                hydra.choose_acceptance(accept, 1.0, 0.09, 0.3),
                                cuda_graph=cuda_graph)
        for _ in range(2):  # the second text is replayed from its first step on
            texts.append(hydra.decode(decoder, ids, max_new_tokens=new).new_tokens)
        assert len(decoder.graphs) == cuda_graph * (1 + (length > 400))
    assert texts[0:2] == texts[2:4] == texts[4:6]
    assert (texts[0] == texts[1]) == (accept == "greedy")


def asking(tokens, logits, tree):
    """A rule that lets the host wait for the GPU, which no graph can hold."""
    assert tokens.min().item() >= 0
    return hydra.accept_greedy(tokens, logits, tree)


def generate_without_a_graph(name):
    """What the next test does in a process of its own: print an error, then a text and its oracle.

    Of its own, since torch leaves CUDA's random numbers unusable where a recording failed.
    """
    model, (prompt,) = base(name, device="cuda"), random_prompts(53, 5)
    heads, ids = make_heads("hydra", model), torch.tensor([prompt], device="cuda")
    options = dict(max_new_tokens=40, accept=asking, eos_token_id=None)
    try:
        hydra.generate(model, heads, ids, **options)
    except ValueError as error:
        print(error)
    output = hydra.generate(model, heads, ids, cuda_graph=False, **options)
    print(assert_greedy(model, [prompt], output, 40))


@needs_cuda
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_decode_loop_cuda_names_the_option_where_no_graph_can_be_recorded(name):
    code = f"import test_hydra; test_hydra.generate_without_a_graph({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent)
    *error, tied = done.stdout.splitlines() or [""]
    assert re.search("no CUDA graph.*--no-cuda-graph", " ".join(error)), done.stderr
    assert tied == "[]", done.stderr


def test_decode_loop_prefill_takes_any_mask_but_zero_as_a_token():
    model, prompts = base("llama"), random_prompts(61, 5, 2)
    ids, mask = pad(prompts, "left")
    got = [hydra.Decoder(model, None, hydra.build_tree([]), 2, 20).prefill(ids, each)[0].tolist()
           for each in (mask, mask * 5, mask * 0.5)]
    assert got[0] == got[1] == got[2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_decode_loop_padding_wider_than_the_cache(side):
    model, prompts = base("llama"), random_prompts(3, 10, 4)
    ids, mask = pad([*prompts, (0,) * 40], side)
    ids, mask = ids[:2], mask[:2]
    output = hydra.generate(model, make_heads("hydra", model), ids, attention_mask=mask, tree=SEVEN,
                            max_new_tokens=5)  # 22 slots for 40 columns
    assert output.new_tokens == [wanted(model, prompt, 5) for prompt in prompts]


@torch.inference_mode()
def test_decode_loop_reads_a_long_prompt_after_a_short_one():
    model = base("llama", max_position_embeddings=1200, initializer_range=0.3)
    heads, states = make_heads("hydra", model), []
    for before in (None, 5):  # after a step over 512 slots
        decoder = hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 1, 700)
        if before:
            decoder.prefill(torch.tensor(random_prompts(62, before)))
            decoder.step()
        decoder.prefill(torch.tensor(random_prompts(63, 650)))
        states.append(decoder.hidden)
    assert_close(*states)


def test_decode_loop_refuses_heads_of_another_width():
    model, other = base("llama"), base("llama", hidden_size=16)
    with pytest.raises(ValueError, match=r"\(32, 32\).*\(32, 16\)"):
        hydra.generate(model, make_heads("hydra", other), torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("settings", [
    dict(window_size=8), dict(keep_window_size=8), dict(rope_parameters=dict(
        rope_type="longrope", original_max_position_embeddings=8))], ids=lambda part: [*part][0])
def test_decode_loop_keeps_context_and_tree_within_windows_of_other_kinds(settings):
    model = copy.deepcopy(base("llama"))
    vars(model.config).update(settings)
    hydra.check_fit(model, None, hydra.build_tree([]), 7)
    with pytest.raises(ValueError, match="context and tree exceed a window of 8"):
        hydra.check_fit(model, None, hydra.build_tree([]), 8)  # and a root


@pytest.mark.parametrize("kind", ["linear_attention", "conv", "mamba", "hybrid",
                                  "chunked_attention", "indexed_attention", "hybrid_sliding",
                                  "compressed_sparse_attention", "minimax_m3_sparse"])
def test_decode_loop_refuses_layers_of_other_types(kind):
    model = copy.deepcopy(base("llama"))
    model.config.layer_types = [kind, FULL]
    with pytest.raises(ValueError, match=f"layers of type {{'{kind}'}}"):
        hydra.check_fit(model, None, hydra.build_tree([]), 8)


def test_decode_loop_refuses_an_odd_text_model_of_a_base_with_pictures():
    model = with_pictures()
    model.config.get_text_config().layer_types = ["indexed_attention"] * 3
    with pytest.raises(ValueError, match="indexed_attention"):
        hydra.check_fit(model, None, hydra.build_tree([]), 8)


def test_decode_loop_check_fit_at_its_bounds():
    model = base("llama")
    heads = make_heads("hydra", model)
    hydra.check_fit(model, heads, hydra.build_tree([[VOCAB - 1]]), LIMIT)  # the last token's rank
    for max_context in (0, -1, LIMIT + 1):
        with pytest.raises(ValueError, match=f"must lie in 1 .. {LIMIT}"):
            hydra.Decoder(model, heads, hydra.build_tree(SEVEN), 1, max_context)


def test_decode_loop_refuses_a_decoder_for_another_batch():
    model = base("llama")
    decoder = hydra.Decoder(model, None, hydra.build_tree([]), 2, LIMIT)
    for rows in (1, 3):
        with pytest.raises(ValueError, match=r"must have the same shape, \(2, T\)"):
            hydra.decode(decoder, torch.ones(rows, 3, dtype=torch.long))


def test_decode_loop_steps_after_a_prefill_only():
    decoder = hydra.Decoder(base("llama"), None, hydra.build_tree([]), 1, LIMIT)
    with pytest.raises(ValueError, match="prefill comes before the first step"):
        decoder.step()


def test_decode_loop_reads_fewer_slots_once_the_longest_row_is_done():
    model = base("llama", max_position_embeddings=1200, initializer_range=0.3)
    decoder = hydra.Decoder(model, make_heads("hydra", model), hydra.build_tree(SEVEN), 2, 603)
    prompts = random_prompts(65, 600, 5)  # room for 3 tokens behind the first
    ids, mask = pad(prompts)
    output = hydra.decode(decoder, ids, attention_mask=mask, max_new_tokens=40)
    assert decoder.cache.slots_read == 512
    assert output.new_tokens == [wanted(model, prompts[0], 40, limit=603),
                                 wanted(model, prompts[1], 40, limit=603)]


def test_decode_loop_cache_has_a_slot_for_each_token_and_node():
    model, ids = base("llama"), torch.ones(2, 3, dtype=torch.long)
    decoder = hydra.Decoder(model, make_heads("hydra++", model), hydra.build_tree(SEVEN), 2, 13)
    hydra.decode(decoder, ids, max_new_tokens=10)
    tensors = [*decoder.cache.keys.values(), *decoder.cache.values.values()]
    slots, floats = 13 + 7, 3 * 2 * 2 * WIDTH  # layers, keys and values, rows, D
    assert sum(tensor.numel() for tensor in tensors) == slots * floats


def test_decode_loop_output_keeps_the_dtype():
    ids = torch.ones(2, 3, dtype=torch.int32)
    output = hydra.generate_plain(base("llama"), ids, max_new_tokens=1)
    assert output.sequences.dtype == torch.int32 and output.tokens_per_step == 0


def test_decode_loop_hidden_state_keeps_the_dtype_of_the_base():
    model = base("llama", torch.bfloat16)
    assert hydra.Decoder(model, None, hydra.build_tree([]), 1, 9).hidden.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------- 8 training

def read_text(model, ids):
    """The base's hidden states, embeddings and logits of a text (B, T)."""
    out = model(ids, output_hidden_states=True)
    return out.hidden_states[-1], model.get_input_embeddings()(ids), out.logits


@pytest.mark.parametrize("lm_weight, teacher_weight", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_training_head_losses_equal_a_loop_over_positions(kind, lm_weight, teacher_weight):
    torch.manual_seed(0)
    model, ids = base("llama"), torch.randint(VOCAB, (2, 9))
    heads, labels = make_heads(kind, model), ids.clone()
    labels[0, 2:5] = labels[1, 7] = -100
    hidden, embeddings, logits = read_text(model, ids)
    hidden, embeddings = heads.read_prefix(hidden).detach(), embeddings.detach()
    for counted in (labels, None):
        got = hydra.head_losses(heads, hidden, embeddings, ids, logits, counted,
                                lm_weight=lm_weight, teacher_weight=teacher_weight)
        for i in range(NUM_HEADS):
            losses = []
            for row, t in itertools.product(range(2), range(9)):
                target = t + 2 + i
                if target >= 9 or counted is not None and counted[row, target] == -100:
                    continue
                guess = heads(i, hidden[row, t][None], embeddings[row, t + 1:t + 2 + i][None])[0]
                log_p = guess.log_softmax(-1)
                teacher = logits[row, target - 1].softmax(-1)  # the base's word on that token
                losses.append(-lm_weight * log_p[ids[row, target]]
                              - teacher_weight * (teacher * log_p).sum())
            assert_close(got[i], torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_training_head_losses_teacher_is_soft_cross_entropy():
    model, ids = base("llama"), torch.randint(VOCAB, (2, 9))
    heads = make_heads("hydra", model, num_heads=1)
    hidden, embeddings, logits = read_text(model, ids)
    got = hydra.head_losses(heads, hidden, embeddings, ids, logits, lm_weight=0, teacher_weight=1)
    guess = heads(0, hidden[:, :-2], embeddings[:, 1:-1, None])
    soft = F.cross_entropy(guess.flatten(0, 1), logits[:, 1:-1].flatten(0, 1).softmax(-1))
    assert_close(got, soft[None], atol=1e-4, rtol=1e-4)


def test_training_head_losses_reach_every_weight_of_every_head():
    model, ids = base("llama"), torch.randint(VOCAB, (2, 9))
    heads = make_heads("hydra++", model)
    hidden, embeddings, logits = read_text(model, ids)
    losses = hydra.head_losses(heads, heads.read_prefix(hidden), embeddings, ids, logits)
    assert losses.shape == (NUM_HEADS,)
    losses.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in heads.parameters())
    none = hydra.head_losses(heads, hidden, embeddings, ids, logits, torch.full_like(ids, -100))
    assert none.tolist() == [0] * NUM_HEADS  # nothing counts: no loss, and no nan


def test_training_shows_what_grounding_is_for():
    """In this text every other symbol is random and the next one follows from it.

    Head 0 guesses the token after next. Where that follows from the random one in between, which
    no state can foretell, Hydra reads it and Medusa has to guess.
    """
    model, symbols = base("llama"), torch.Generator().manual_seed(0)
    follower = torch.randperm(VOCAB, generator=symbols)
    chosen = torch.randint(VOCAB, (3000,), generator=symbols)
    text = torch.stack([chosen, follower[chosen]], 1).flatten()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    top1 = {}
    for kind in ("medusa", "hydra"):
        torch.manual_seed(0)
        heads = hydra.DraftHeads(hydra.HydraConfig(num_heads=1, **KINDS[kind]), model)
        history = hydra.train_heads(model, heads, text[:5000], steps=150, batch_size=8,
                                    seq_len=64, lr=1e-2)
        assert history and not heads.training
        ids = text[5000:].view(10, 100)
        with torch.no_grad():
            hidden, embeddings, _ = read_text(model, ids)
            guess = heads(0, hidden[:, :-2], embeddings[:, 1:-1, None]).argmax(-1)
        top1[kind] = (guess == ids[:, 2:])[:, 1::2].float().mean().item()  # x[t+1] is random
    assert top1["hydra"] > 0.95 and top1["medusa"] < 0.15, top1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def expected_tokens(choices, ranks):
    """1 + accepted drafts, on average over all rows of ranks, by trying every choice."""
    return 1 + sum(row[:len(choice)] == choice for choice in choices for row in ranks) / len(ranks)


@pytest.mark.parametrize("seed", range(8))
def test_training_search_tree_equals_brute_force(seed):
    chance = random.Random(seed)
    ranks = [[min(chance.randrange(4), chance.randrange(4)) for _ in range(3)] for _ in range(12)]
    seen = sorted({tuple(row[:depth]) for row in ranks for depth in (1, 2, 3)})
    for size in (1, 2, 4, 5):
        got = [tuple(choice) for choice in hydra.search_tree(torch.tensor(ranks), size)]
        assert len(got) == size - 1 and hydra.build_tree(got).num_nodes == size
        best = max(expected_tokens([list(choice) for choice in choices], ranks)
                   for choices in itertools.combinations(seen, size - 1)
                   if all(len(choice) == 1 or choice[:-1] in choices for choice in choices))
        assert_close(expected_tokens([list(choice) for choice in got], ranks), best)


def test_training_search_tree_breaks_ties_by_length_then_path():
    ranks = torch.tensor([[1, 0], [0, 2], [0, 1], [2, 2]])
    by_rank = [[0], [1], [2], [0, 1], [0, 2], [1, 0], [2, 2]]  # 2 of 4, then all 1 of 4
    for size in range(1, 9):
        assert sorted(hydra.search_tree(ranks, size)) == sorted(by_rank[:size - 1])
    assert len(hydra.search_tree(ranks, 50)) == 7  # no more were seen


@lru_cache(maxsize=None)
def trained(kind):
    """A base, three of its greedy texts (3, 96) with 4 given tokens, heads, trained heads."""
    model = base("llama")
    text = torch.tensor([[*prompt, *continuation(model, prompt)]
                         for prompt in random_prompts(43, 4, 4, 4)])
    torch.manual_seed(0)
    before, heads = (hydra.DraftHeads(hydra.HydraConfig(**KINDS[kind]), model) for _ in range(2))
    history = hydra.train_heads(model, heads, text.flatten(), steps=80, batch_size=8, seq_len=32,
                                lr=1e-2)
    assert [len(losses) for losses in history] == [NUM_HEADS] * 5  # steps 0, 25, 50, 75 and 79
    return model, text, before, heads


@pytest.mark.parametrize("kind, gain", [("medusa", 0.1), ("hydra", 0.7), ("hydra++", 0.7)])
def test_training_gives_more_tokens_per_step(kind, gain):
    model, text, *both = trained(kind)
    before, after = (hydra.generate(model, heads, text[:, :4], tree=SEVEN, max_new_tokens=92)
                     for heads in both)
    assert torch.equal(before.sequences, text) and torch.equal(after.sequences, text)
    assert after.tokens_per_step > before.tokens_per_step + gain


@pytest.mark.parametrize("kind", KINDS)
def test_training_head_ranks_say_which_drafts_are_accepted(kind):
    """Real decoding along a text accepts the longest choice that its ranks start with."""
    model, text, _, heads = trained(kind)
    ranks = hydra.head_ranks(model, heads, text)[:, 3:].tolist()
    for choices in (SEVEN, random_choices(8), [[1], [1, 0]], []):
        output = hydra.generate(model, heads, text[:, :4], tree=choices, max_new_tokens=92)
        for row, counts in zip(ranks, output.emitted):
            starts = itertools.accumulate(counts, initial=0)
            for start, count in itertools.takewhile(lambda pair: pair[0] < len(row),
                                                    zip(starts, counts)):
                here = row[start]
                accepted = [depth for depth in range(NUM_HEADS + 1)
                            if depth == 0 or here[:depth] in choices]
                assert count - 1 == max(accepted)


def test_training_fastest_tree_is_a_tree_for_these_heads():
    model, text, _, heads = trained("hydra")
    choices = hydra.fastest_tree(model, heads, text[:, :4])
    assert hydra.build_tree(choices).num_nodes in (2, 4, 8, 12, 16, 24, 32, 48, 64)
    hydra.check_fit(model, heads, hydra.build_tree(choices), LIMIT)


@pytest.mark.parametrize("seconds, nodes", [
    (lambda size: size, {2}), (lambda size: 1 + (size > 8), {4, 8}),
    (lambda size: 1 + size / 1e6, {24, 32, 48, 64})])  # the smallest that writes as fast
def test_training_fastest_tree_weighs_tokens_against_time(seconds, nodes, monkeypatch):
    def timed(*args, **options):  # by another clock
        output = generate(*args, **options)
        output.seconds = len(output.emitted[0]) * seconds(1 + len(options["tree"]))
        return output

    generate = hydra.generate
    monkeypatch.setattr(hydra, "generate", timed)
    model, text, _, heads = trained("hydra")
    assert 1 + len(hydra.fastest_tree(model, heads, text[:, :4])) in nodes


def test_training_stopped_by_ctrl_c_keeps_what_it_has():
    model, seen = base("llama", torch.bfloat16), []
    heads = hydra.DraftHeads(hydra.HydraConfig(), model)
    first = heads.hydra_lm_head[0].weight.clone()

    def losses(input_ids, labels):
        seen.append((heads.training, heads.hydra_lm_head[0].weight.dtype))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return torch.stack([lm_head.weight.square().sum() for lm_head in heads.hydra_lm_head])

    with pytest.raises(KeyboardInterrupt):
        hydra.fit(heads, losses, torch.arange(90) % VOCAB, steps=9, seq_len=8)
    assert seen == [(True, torch.float32)] * 4 and not heads.training
    assert {weight.dtype for weight in heads.parameters()} == {torch.bfloat16}
    assert not torch.equal(heads.hydra_lm_head[0].weight, first)


@pytest.mark.parametrize("i", range(4))
def test_training_true_paths_equal_a_loop_over_positions(i):
    embeddings = torch.randn(2, 9, 5)
    got = hydra.true_paths(embeddings, i)
    assert got.shape == (2, 9 - 2 - i, i + 1, 5)
    for row, t, k in itertools.product(range(2), range(9 - 2 - i), range(i + 1)):
        assert torch.equal(got[row, t, k], embeddings[row, t + 1 + k])


@pytest.mark.parametrize("kind", KINDS)
def test_training_head_ranks_equal_a_loop_over_positions(kind):
    torch.manual_seed(0)
    model, ids = base("llama"), torch.randint(VOCAB, (2, 11))
    heads = make_heads(kind, model)
    got = hydra.head_ranks(model, heads, ids)
    assert got.shape == (2, 11 - 1 - NUM_HEADS, NUM_HEADS)
    hidden, embeddings, _ = read_text(model, ids)
    hidden = heads.read_prefix(hidden)
    for row, t, i in itertools.product(range(2), range(got.shape[1]), range(NUM_HEADS)):
        path = embeddings[row, t + 1:t + 2 + i]
        order = heads(i, hidden[row, t][None], path[None])[0].argsort(descending=True).tolist()
        assert got[row, t, i] == order.index(ids[row, t + 2 + i])


def test_training_labels_are_cut_by_the_same_windows():
    module, seen = nn.Linear(4, 4), []

    def losses(input_ids, labels):
        seen.append((input_ids, labels))
        return module.weight.square().sum()[None]

    text = torch.arange(50, dtype=torch.int32)
    for labels in (1000 - text, None):
        hydra.fit(module, losses, text, labels=labels, steps=3, batch_size=4, seq_len=8)
    for number, (input_ids, labels) in enumerate(seen):
        assert input_ids.shape == (4, 8) and input_ids.dtype == labels.dtype == torch.long
        assert torch.equal(input_ids, input_ids[:, :1] + torch.arange(8))
        assert torch.equal(labels, 1000 - input_ids if number < 3 else input_ids)


def test_training_labels_of_minus_100_do_not_count():
    model, ids = base("llama"), torch.randint(VOCAB, (200,))
    options = dict(steps=1, batch_size=2, seq_len=20)
    first = {}
    for name, labels in (("none", None), ("all", ids), ("nothing", torch.full_like(ids, -100)),
                         ("some", torch.where(ids % 2 == 0, ids, -100))):
        torch.manual_seed(0)
        heads = hydra.DraftHeads(hydra.HydraConfig(), model)
        first[name] = hydra.train_heads(model, heads, ids, labels=labels, **options)[0]
    assert first["nothing"] == [0] * NUM_HEADS
    assert first["none"] == first["all"] != first["some"]
    assert min(first["some"]) > 0


def test_training_labels_reach_the_losses(monkeypatch):
    model, heard, losses = base("llama"), [], hydra.head_losses

    def recorded(heads, hidden, embeddings, input_ids, base_logits, labels, **weights):
        heard.append((input_ids, labels, weights))
        return losses(heads, hidden, embeddings, input_ids, base_logits, labels, **weights)

    monkeypatch.setattr(hydra, "head_losses", recorded)
    ids = torch.randint(VOCAB, (200,))
    hydra.train_heads(model, make_heads("hydra", model), ids, steps=2, seq_len=20, lm_weight=0.3,
                      teacher_weight=0.5, labels=torch.where(ids > 9, ids, -100))
    assert len(heard) == 2
    for input_ids, labels, weights in heard:
        assert torch.equal(labels, torch.where(input_ids > 9, input_ids, -100))
        assert weights == dict(lm_weight=0.3, teacher_weight=0.5)


def test_training_fastest_tree_shrugs_off_one_slow_prompt(monkeypatch):
    def timed(*args, **options):
        output = generate(*args, **options)
        sizes.append(1 + len(options["tree"]))
        output.seconds = sizes[-1] + 100 * (sizes[-1] == 2 and sizes.count(2) == 2)
        return output

    generate, search, sizes, heard = hydra.generate, hydra.search_tree, [], []
    monkeypatch.setattr(hydra, "generate", timed)
    monkeypatch.setattr(hydra, "search_tree", lambda ranks, size: heard.append(ranks) or search(
        ranks, size))
    model, text, _, heads = trained("hydra")
    assert len(hydra.fastest_tree(model, heads, text[:, :4])) == 1
    # the ranks are those behind the prompts
    assert torch.equal(heard[0], hydra.head_ranks(model, heads, text)[:, 3:].flatten(0, 1))


def test_training_fit_reads_every_window_and_refuses_short_ones():
    module, seen = nn.Linear(4, 4), []

    def losses(input_ids, labels):
        seen.append(input_ids)
        return module.weight.square().sum()[None]

    hydra.fit(module, losses, torch.arange(8), steps=1, batch_size=2, seq_len=8)
    assert seen[0].tolist() == [[*range(8)]] * 2
    hydra.fit(module, losses, torch.arange(9), steps=1, batch_size=50, seq_len=8)
    assert set(seen[1][:, 0].tolist()) == {0, 1}
    for seq_len in (7, 10):
        with pytest.raises(ValueError, match="8 .. 9"):
            hydra.fit(module, losses, torch.arange(9), steps=1, seq_len=seq_len)


def test_training_fit_warms_up_cools_down_and_clips(monkeypatch):
    module, rates, norms = nn.Linear(4, 4), [], []
    step = torch.optim.AdamW.step

    def recorded(optimizer, *args, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        norms.append(module.weight.grad.norm().item())
        return step(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    hydra.fit(module, lambda *_: 1e3 * module.weight.square().sum()[None], torch.arange(50),
              steps=40, seq_len=8, lr=0.1, final_lr=0.25)
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.025, rel=0.01) and max(norms) < 1.001


@pytest.fixture
def texts():
    """To train on, and to choose a tree: each of tokens of its own."""
    return [torch.arange(400) % 10 + 10 * part for part in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_make_heads_by_the_recipe_of_their_kind(kind, texts, tmp_path, monkeypatch):
    model, heard, losses = base("llama"), [], hydra.head_losses

    def recorded(*args, **options):
        heard.append((options, args[3].max().item()))
        return losses(*args, **options)

    monkeypatch.setattr(hydra, "head_losses", recorded)
    monkeypatch.setattr(hydra, "fastest_tree", lambda model, heads, prompts: heard.append(
        (prompts.min().item(), prompts.max().item())) or [[0]])
    heads = hydra.make_heads(kind, model, *texts, tmp_path, steps=1, seq_len=32, batch_size=2)
    weights = (0.0, 1.0) if kind == "hydra++" else (1.0, 0.0)
    assert heard == [(dict(zip(("lm_weight", "teacher_weight"), weights)), 9), (10, 19)]
    assert heads.config == hydra.HydraConfig(**KINDS[kind])
    for other in set(KINDS) - {kind}:
        with pytest.raises(ValueError, match=f"other heads than 4 of {re.escape(other)}"):
            hydra.make_heads(other, model, *texts, tmp_path)
    with pytest.raises(ValueError, match=f"other heads than 3 of {re.escape(kind)}"):
        hydra.make_heads(kind, model, *texts, tmp_path, num_heads=3)


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n): Ctrl-C comes in training step n + 1."""
    def stop(steps):
        def losses(heads, *_, **__):
            seen.append([weight.detach().clone() for weight in heads.parameters()])
            if len(seen) > steps:
                raise KeyboardInterrupt
            return sum(weight.square().sum() for weight in heads.parameters())[None]

        seen = []
        monkeypatch.setattr(hydra, "head_losses", losses)
        return seen

    return stop


def test_training_make_heads_keeps_what_ctrl_c_leaves(texts, tmp_path, stop_after):
    model, seen = base("llama"), stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        hydra.make_heads("hydra", model, *texts, tmp_path, steps=5, seq_len=32)
    saved = hydra.DraftHeads.from_pretrained(tmp_path, model)
    assert saved.choices is None
    assert all(map(torch.equal, saved.parameters(), seen[2]))
    assert not all(map(torch.equal, seen[0], seen[2]))


def test_training_make_heads_goes_on_where_it_was_interrupted(texts, tmp_path, stop_after,
                                                              monkeypatch):
    model, seen = base("llama"), stop_after(2)
    monkeypatch.setattr(hydra, "fastest_tree", lambda *_: [[0]])
    make = partial(hydra.make_heads, "hydra", model, *texts, tmp_path, seq_len=32)
    with pytest.raises(KeyboardInterrupt):
        make(steps=5)
    left, seen = seen[2], stop_after(9)
    heads = make(steps=1)
    assert all(map(torch.equal, left, seen[0]))  # not from the start
    assert heads.choices == hydra.DraftHeads.from_pretrained(tmp_path, model).choices == [[0]]


def test_training_make_heads_keeps_trained_heads_when_no_tree_is_found(texts, tmp_path,
                                                                       monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hydra, "fastest_tree", stop)
    model = base("llama")
    with pytest.raises(KeyboardInterrupt):
        hydra.make_heads("hydra", model, *texts, tmp_path, steps=1, seq_len=32)
    assert hydra.DraftHeads.from_pretrained(tmp_path, model).choices is None


def test_training_make_heads_uses_finished_heads_as_they_are(texts, tmp_path, stop_after, capsys):
    model, seen = base("llama"), stop_after(0)
    finished = make_heads("hydra", model)
    finished.choices = SEVEN
    finished.save_pretrained(tmp_path)
    heads = hydra.make_heads("hydra", model, *texts, tmp_path, steps=5, seq_len=32)
    assert heads.choices == SEVEN and not seen
    assert all(map(torch.equal, heads.parameters(), finished.parameters()))
    assert f"{tmp_path} holds finished heads, used as they are" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_fit_computes_in_the_precision_of_the_module(dtype):
    module, seen = nn.Linear(4, 4).to(dtype), []

    def losses(input_ids, labels):
        seen.append(torch.is_autocast_enabled("cpu"))
        return module.weight.square().sum()[None]

    hydra.fit(module, losses, torch.arange(8), steps=1, seq_len=8)
    assert seen == [dtype == torch.bfloat16]


# ----------------------------------------------------------------------------------- 9 models

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model with its tokenizer, and in heads/ Hydra++ heads with a tree."""
    path = tmp_path_factory.mktemp("model")
    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator(["the tree of the tokens"], vocab_size=280, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer)
    tokenizer.save_pretrained(path)
    model = base("llama", vocab_size=len(tokenizer), max_position_embeddings=128,
                 eos_token_id=None, bos_token_id=None)
    model.save_pretrained(path)
    heads = make_heads("hydra++", model)
    heads.choices = [[0], [1], [0, 0], [0, 0, 1]]
    heads.save_pretrained(path / "heads")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_models_heads_come_back_as_they_were_saved(kind, num_layers, tmp_path):
    model = base("llama-gqa")
    heads = make_heads(kind, model, num_layers=num_layers)
    heads.save_pretrained(tmp_path)
    again = hydra.DraftHeads.from_pretrained(tmp_path, model)
    assert again.config == heads.config and not again.training
    hidden, embeddings = torch.randn(2, 5, model.config.hidden_size).split([1, 4], dim=1)
    for i in range(NUM_HEADS):
        args = i, hidden[:, 0], embeddings[:, :i + 1]
        assert torch.equal(again(*args), heads(*args))


def released_keys(arch, grounded, num_layers):
    """The keys of a released checkpoint, spelt out: reference for both ways."""
    keys = {"input_embed_fn.weight"}
    for i in range(NUM_HEADS):
        for j in range(num_layers):
            block = f"hydra_mlp.{i}.{2 * j + 1 if arch == 'prefix-mlp' else j}"
            keys |= {f"{block}.linear.weight", f"{block}.linear.bias"}
            if grounded and j == 0:
                keys |= {f"{block}.res_connection.weight", f"{block}.res_connection.bias"}
        lm_head = f"hydra_lm_head.{i}.1" if arch == "prefix-mlp" else f"hydra_lm_head.{i}"
        keys |= {f"{lm_head}.weight", f"{lm_head}.bias"}
    if arch == "prefix-mlp":
        layer = "prefix_embeding_layer.layers.0"
        keys |= {f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"}
        keys |= {f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        keys |= {f"{layer}.{name}_layernorm.weight" for name in ("input", "post_attention")}
        keys |= {"prefix_embeding_layer.norm.weight", "prefix_embeding_layer.embed_tokens.weight",
                 f"{layer}.self_attn.rotary_emb.inv_freq"}
    return keys


def write_released(path, model, arch="prefix-mlp", grounded=True, num_layers=4):
    """A checkpoint in the released format with random weights, made without hydra.py."""
    width, vocab = model.config.hidden_size, model.config.vocab_size
    chance = torch.Generator().manual_seed(0)
    state, shared = {}, {}
    for key in sorted(released_keys(arch, grounded, num_layers)):
        parts = key.split(".")
        if parts[0] == "hydra_mlp":
            first = int(parts[2]) < (2 if arch == "prefix-mlp" else 1)
            wide = (int(parts[1]) + 2) * width if grounded and first else width
            shape = (width, wide) if parts[-1] == "weight" else (width,)
            # the blocks after the first are one; without grounding all of them are
            name = (parts[1], first and grounded, *parts[3:])
            state[key] = shared.setdefault(name, torch.randn(shape, generator=chance) / 8)
            continue
        shape = (vocab, width)
        if parts[-1] == "bias":
            shape = (vocab,)
        elif "layers" in parts:
            inner = model.config.intermediate_size
            shape = {"gate_proj": (inner, width), "up_proj": (inner, width), "inv_freq": (2,),
                     "down_proj": (width, inner)}.get(parts[-2 if parts[-1] == "weight" else -1],
                                                      (width, width))
        if "norm" in key:
            shape = (width,)
        state[key] = torch.randn(shape, generator=chance) / 8
    state["input_embed_fn.weight"] = model.get_input_embeddings().weight.detach()
    torch.save(state, path / "hydra_lm_head.pt")
    (path / "config.json").write_text(json.dumps({
        "hydra_num_heads": NUM_HEADS, "hydra_num_layers": num_layers, "hydra_head_arch": arch,
        "grounded_heads": grounded, "base_model_name_or_path": "a/base"}))
    return state


@pytest.mark.parametrize("arch, grounded, num_layers", [
    ("mlp", False, 2), ("mlp", True, 1), ("mlp", True, 3), ("prefix-mlp", True, 4)])
def test_models_read_and_write_the_released_format(arch, grounded, num_layers, tmp_path):
    model = base("llama")
    state = write_released(tmp_path, model, arch, grounded, num_layers)
    heads = hydra.DraftHeads.from_pretrained(tmp_path, model)
    hidden, embeddings = torch.randn(5, model.config.hidden_size).split([1, 4])
    x = torch.cat([hidden[0], embeddings[0], embeddings[1]]) if grounded else hidden[0]
    prefixed = arch == "prefix-mlp"
    for j in range(num_layers):  # head 1, from the file itself
        block = f"hydra_mlp.1.{2 * j + 1 if prefixed else j}"
        residual = x
        if grounded and j == 0:
            residual = (state[f"{block}.res_connection.weight"] @ x
                        + state[f"{block}.res_connection.bias"])
        x = residual + F.silu(state[f"{block}.linear.weight"] @ x + state[f"{block}.linear.bias"])
    lm_head = "hydra_lm_head.1.1" if prefixed else "hydra_lm_head.1"
    want = state[f"{lm_head}.weight"] @ x + state[f"{lm_head}.bias"]
    assert_close(heads(1, hidden[0], embeddings[:2]), want, atol=1e-4, rtol=1e-4)
    heads.save_pretrained(tmp_path / "again")
    written = torch.load(tmp_path / "again" / "hydra_lm_head.pt", weights_only=True)
    unused = {key for key in state if key.endswith(("embed_fn.weight", "tokens.weight", "_freq"))}
    assert set(written) == set(state) - unused
    assert all(torch.equal(written[key], state[key]) for key in written)


def test_models_warn_of_heads_for_other_embeddings(tmp_path, recwarn):
    model = base("llama")
    state = write_released(tmp_path, model)
    hydra.DraftHeads.from_pretrained(tmp_path, model)
    assert not recwarn.list
    state["input_embed_fn.weight"] = state["input_embed_fn.weight"] + 0.1
    torch.save(state, tmp_path / "hydra_lm_head.pt")
    before = model.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="trained for a base with other embeddings"):
        hydra.DraftHeads.from_pretrained(tmp_path, model)
    assert torch.equal(before, model.get_input_embeddings().weight)


def write_vicuna(path):
    """A tiny base in the files of lmsys/vicuna-7b-v1.3: .bin shards, old keys, tokenizer.model."""
    path.mkdir()
    text = "A chat between a curious user and an assistant. USER: What is a tree? ASSISTANT: wood"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 9), model_prefix=str(path / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    about = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
             "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    model = base("llama", vocab_size=300, max_position_embeddings=2048, bos_token_id=1,
                 eos_token_id=2, pad_token_id=0)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(ids | {"temperature": 0.9}))
    state = model.half().state_dict()
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    files = {key: f"pytorch_model-0000{1 + place % 2}-of-00002.bin"
             for place, key in enumerate(state)}
    for file in set(files.values()):
        torch.save({key: state[key] for key in state if files[key] == file}, path / file)
    index = {"metadata": {}, "weight_map": files}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return model.float()


def test_models_vicuna_as_it_lies_on_disk(tmp_path, capsys):
    written = write_vicuna(tmp_path / "vicuna-7b-v1.3")
    heads = tmp_path / "hydra-vicuna-7b-v1.3"
    heads.mkdir()
    write_released(heads, written)
    args = ("--model", tmp_path / "vicuna-7b-v1.3", "--heads", heads, "--device", "cpu", "--prompt",
            "What is a tree?", "--max-new-tokens", 24)
    code, out, err = run_main(capsys, *args)
    assert code == 0 and "identical to plain decoding's" in err
    model, _, tokenizer = hydra.load(str(tmp_path / "vicuna-7b-v1.3"), device="cpu")
    assert torch.equal(model.lm_head.weight, written.lm_head.weight)  # both went through fp16
    prompt = ("A chat between a curious user and an artificial intelligence assistant. The "
              "assistant gives helpful, detailed, and polite answers to the user's questions. "
              "USER: What is a tree? ASSISTANT:")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0, 0] == 1
    text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          max_new_tokens=24)[0, ids.shape[1]:]
    assert out.strip() == tokenizer.decode(text, skip_special_tokens=True).strip()
    raw = run_main(capsys, *args, "--raw")[1]
    assert raw.startswith("What is a tree?") and raw != out


@pytest.mark.parametrize("spoil, message", [
    (lambda state: state.pop("hydra_lm_head.2.1.bias"), "hydra_lm_head.2.1.bias"),
    (lambda state: state.update(surplus=torch.ones(1)), "surplus"),
    (lambda state: state.update({"hydra_lm_head.0.1.bias": torch.ones(3)}), "size mismatch"),
    (lambda state: state.update({"hydra_mlp.3.5.linear.bias":
                                 state["hydra_mlp.3.5.linear.bias"] + 1}), "equal the other"),
])
def test_models_say_what_is_wrong_with_a_checkpoint(spoil, message, tmp_path):
    model = base("llama")
    state = write_released(tmp_path, model)
    spoil(state)
    torch.save(state, tmp_path / "hydra_lm_head.pt")
    with pytest.raises(ValueError, match=message):
        hydra.DraftHeads.from_pretrained(tmp_path, model)


def test_models_refuse_what_they_cannot_do(tmp_path):
    model = base("llama")
    for changes in ({"hydra_head_arch": "eagle-attn"}, {"hidden_state_offset": 1}):
        write_released(tmp_path, model)
        about = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match="supported"):
            hydra.DraftHeads.from_pretrained(tmp_path, model)
    (tmp_path / "hydra_lm_head.pt").write_bytes(pickle.dumps(print))  # it would be run
    write_config = {"hydra_num_heads": NUM_HEADS, "grounded_heads": True}
    (tmp_path / "config.json").write_text(json.dumps(write_config))
    with pytest.raises(ValueError, match="does not fit"):
        hydra.DraftHeads.from_pretrained(tmp_path, model)


def test_models_heads_on_disk_stay_whole_when_writing_fails(tmp_path, monkeypatch):
    model = base("llama")
    old, new = (make_heads("hydra", model, seed) for seed in range(2))
    old.save_pretrained(tmp_path)

    def save(state, path):
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="no space"):
            new.save_pretrained(tmp_path)
    for heads in (old, new):
        again = hydra.DraftHeads.from_pretrained(tmp_path, model)
        assert all(map(torch.equal, again.parameters(), heads.parameters()))
        new.save_pretrained(tmp_path)


def test_models_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nä", "utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb")  # with a byte order mark
    assert hydra.read_texts([tmp_path / "a.txt", str(tmp_path / "b.txt")]) == ["a\n\nä", "b"]


def test_models_read_texts_names_what_is_no_text(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    for name, content in (("latin.txt", b"\xe4"), ("wide.txt", "tree".encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no UTF-8 text"):
            hydra.read_texts([tmp_path / "good.txt", tmp_path / name])
    for name in ("absent.txt", ""):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
            hydra.read_texts([tmp_path / name])


def test_models_encode_texts():
    def tokenizer(text):
        return SimpleNamespace(input_ids=list(map(int, text)))

    parts = hydra.encode(tokenizer, ["12", "345", "6", "7890"] * 700)
    assert [len(part) for part in parts] == [6300, 350, 350]
    assert torch.cat(parts).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 700


@pytest.mark.parametrize("tokens, count, width, starts", [
    (45, 2, 10, [0, 22]), (45, 9, 20, [0, 20]), (45, 3, 15, [0, 15, 30]), (45, 1, 45, [0]),
    (100, 4, 10, [0, 25, 50, 75]), (100, 3, 1, [0, 33, 66])])
def test_models_cut_evenly_spread_windows(tokens, count, width, starts):
    got = hydra.cut(torch.arange(tokens, dtype=torch.int32), count, width, "cpu")
    assert got.dtype == torch.long
    assert got.tolist() == [[*range(start, start + width)] for start in starts]


def test_models_cut_asks_for_more_text():
    with pytest.raises(ValueError, match="45 held-out tokens are too few"):
        hydra.cut(torch.arange(45), 1, 46, "cpu")


@pytest.fixture
def demo(folder, tmp_path, monkeypatch):
    """In place of two minutes of training: a copy of folder. Lists the devices asked for."""
    asked = []

    def train_demo(device):
        asked.append(device)
        shutil.copytree(folder, hydra.demo_folder())
        shutil.copytree(folder / "heads", hydra.demo_folder() / "hydra++")

    monkeypatch.setattr(hydra, "train_demo", train_demo)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def test_models_demo_is_loaded_from_its_folder(demo):
    with pytest.raises(ValueError, match="demo is not there yet: python hydra.py trains it"):
        hydra.load("demo", device="cpu")
    assert demo == []  # loading trains nothing
    hydra.train_demo("cpu")
    for name in ("demo", None):
        model, heads, tokenizer = hydra.load(name, device="cpu")
        assert heads.choices == [[0], [1], [0, 0], [0, 0, 1]]
        assert model.dtype == torch.float32 and model.device.type == "cpu" and not model.training


def test_models_demo_is_named_when_broken(demo):
    hydra.train_demo("cpu")
    weights = hydra.demo_folder() / "model.safetensors"
    weights.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=re.escape(str(weights.parent))):
        hydra.load("demo", device="cpu")


def test_models_demo_with_heads_of_ones_own(demo, tmp_path):
    hydra.train_demo("cpu")
    model, _, _ = hydra.load("demo", device="cpu")
    make_heads("hydra", model).save_pretrained(tmp_path / "own")
    assert hydra.load("demo", tmp_path / "own", "cpu")[1].config == hydra.HydraConfig()


def test_models_demo_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache, folder in (("", tmp_path / ".cache"), (str(tmp_path / "own"), tmp_path / "own")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)  # an empty one is as good as unset
        assert hydra.demo_folder().parent == folder / "hydra"


def test_models_demo_text_is_prose_that_the_default_prompt_begins():
    text = hydra.demo_text()
    assert "The try statement" in text and len(text) > 20_000
    assert "::=" not in text and '"' not in text and "  " not in text


@pytest.fixture
def quick_demo(tmp_path, monkeypatch):
    """train_demo, without the training. Tells what was trained; meanwhile() happens at its end."""
    about = SimpleNamespace(fitted=[], made=[], meanwhile=lambda: None)

    def fit(module, losses, ids, **options):
        batch = ids[:16].view(2, 8)
        about.fitted.append((module, losses(batch, batch), len(ids), options))

    def make(kind, model, train_ids, tree_ids, folder, **options):
        about.made.append((kind, train_ids, tree_ids, options))
        heads = make_heads(kind, model)
        heads.choices = SEVEN
        heads.save_pretrained(folder)
        about.meanwhile()

    monkeypatch.setattr(hydra, "fit", fit)
    monkeypatch.setattr(hydra, "make_heads", make)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return about


def test_models_demo_trains_base_tokenizer_and_heads(quick_demo):
    hydra.train_demo("cpu")
    model, heads, tokenizer = hydra.load("demo", device="cpu")
    assert heads.config == hydra.HydraConfig(**KINDS["hydra++"]) and heads.choices == SEVEN
    ids = tokenizer(hydra.demo_text()).input_ids
    assert tokenizer.decode(ids) == hydra.demo_text()
    ((base_model, loss, num_tokens, options),) = quick_demo.fitted
    assert all(map(torch.equal, base_model.parameters(), model.parameters()))
    assert abs(loss.item() - math.log(512)) < 1 and num_tokens == len(ids)
    ((kind, train_ids, tree_ids, head_options),) = quick_demo.made
    assert kind == "hydra++" and train_ids.tolist() == tree_ids.tolist() == ids
    assert options["steps"] > 0 and head_options["steps"] > 0
    assert [path.name for path in hydra.demo_folder().parent.iterdir()] == [
        hydra.demo_folder().name]


def test_models_another_process_may_have_trained_the_demo(quick_demo):
    def other():
        hydra.demo_folder().mkdir(parents=True)
        (hydra.demo_folder() / "other").touch()

    quick_demo.meanwhile = other
    hydra.train_demo("cpu")
    assert [path.name for path in hydra.demo_folder().iterdir()] == ["other"]
    assert len(list(hydra.demo_folder().parent.iterdir())) == 1


def test_models_demo_is_not_there_before_it_is_whole(quick_demo):
    def stop():
        raise KeyboardInterrupt

    quick_demo.meanwhile = stop
    with pytest.raises(KeyboardInterrupt):
        hydra.train_demo("cpu")
    assert list(hydra.demo_folder().parent.iterdir()) == []


def test_models_short_names_of_vicuna(monkeypatch):
    loaded, bare = [], SimpleNamespace(chat_template=None)
    for part, result in ((transformers.AutoTokenizer, bare), (hydra.DraftHeads, None),
                         (transformers.AutoModelForCausalLM, nn.Linear(1, 1))):
        monkeypatch.setattr(part, "from_pretrained", lambda name, *_, result=result, **__: (
            loaded.append(str(name)) or result))
    for heads, named in ((None, "ankner/hydra-vicuna-13b-v1.3"), ("mine", "mine")):
        loaded.clear()
        _, _, tokenizer = hydra.load("vicuna-13b", heads, "cpu")
        assert loaded == ["lmsys/vicuna-13b-v1.3"] * 2 + [named]
        assert tokenizer.chat_template == hydra.VICUNA_PROMPT


def test_models_name_a_base_that_cannot_be_loaded(monkeypatch):
    def absent(name, *_, **__):
        raise OSError(f"no {name}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    with pytest.raises(ValueError, match="load the base model lmsys/vicuna-7b-v1.3: no lmsys"):
        hydra.load("vicuna-7b", None, "cpu")


def test_models_heads_that_name_no_base(folder, tmp_path):
    write_released(tmp_path, base("llama"), "mlp", True, 1)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        hydra.load(None, tmp_path, "cpu")
    with pytest.raises(ValueError, match="cannot load draft heads from .*absent"):
        hydra.load(None, tmp_path / "absent", "cpu")


def test_models_dtype_and_device_are_those_asked_for(folder):
    assert hydra.load(folder, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA here"):
            hydra.load(folder, device="cuda")


def test_models_heads_whose_configuration_names_nothing(tmp_path):
    model = base("llama")
    write_released(tmp_path, model, "mlp", False, 1)
    (tmp_path / "config.json").write_text("{}")
    heads = hydra.DraftHeads.from_pretrained(tmp_path, model)
    assert heads.config == hydra.HydraConfig(4, 1, False, False, 0.0)


def test_models_heads_keep_their_dropout_and_follow_the_dtype_of_the_base(tmp_path):
    make_heads("hydra++", base("llama"), dropout=0.25).save_pretrained(tmp_path)
    heads = hydra.DraftHeads.from_pretrained(tmp_path, base("llama", torch.bfloat16))
    assert heads.config.dropout == 0.25
    assert {weight.dtype for weight in heads.parameters()} == {torch.bfloat16}


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_models_a_checkpoint_cannot_run_code(tmp_path):
    model = base("llama")
    state = write_released(tmp_path, model)
    torch.save(state | {"more": Hostile(str(tmp_path / "made"))}, tmp_path / "hydra_lm_head.pt")
    with pytest.raises(ValueError, match="does not fit"):
        hydra.DraftHeads.from_pretrained(tmp_path, model)
    assert not (tmp_path / "made").exists()


def test_models_heads_are_saved_in_a_folder_of_a_folder(tmp_path):
    make_heads("hydra", base("llama")).save_pretrained(tmp_path / "new" / "heads")
    assert (tmp_path / "new" / "heads" / "hydra_lm_head.pt").exists()


@pytest.mark.parametrize("arguments", [
    dict(max_new_tokens=30), dict(max_length=20, eos_token_id=[5, 6]), dict(),
    dict(max_new_tokens=9, eos_token_id=None, pad_token_id=9), dict(max_length=9 + 3),
    dict(max_new_tokens=30, return_dict_in_generate=True), dict(max_new_tokens=30, use_cache=False),
    dict(max_new_tokens=30, temperature=0.5, top_k=3)])  # which greedy decoding does not ask for
@pytest.mark.parametrize("shorter", [3, 8])
def test_models_decoding_writes_what_generate_writes(arguments, shorter):
    model, (ids, mask) = base("llama"), pad(random_prompts(51, shorter, 8), "left")
    arguments = {"pad_token_id": 0, "eos_token_id": 3} | arguments
    decoding = hydra.decoding(make_heads("hydra++", model))
    got, want = (model.generate(ids, attention_mask=mask, do_sample=False, **more, **arguments)
                 for more in (dict(custom_generate=decoding), {}))
    if "return_dict_in_generate" in arguments:
        assert isinstance(got, transformers.generation.GenerateDecoderOnlyOutput)
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)


class FourDivides(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] % 4 == 0


class Favourite(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + F.one_hot(input_ids[:, -1], VOCAB)


def cache_with_tokens():
    cache = transformers.DynamicCache()
    base("llama")(torch.ones(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("arguments, name", [
    (dict(num_beams=2), "beam_search"), (dict(num_beams=2, do_sample=True), "beam_sample"),
    (dict(repetition_penalty=1.2), "RepetitionPenalty"),
    (dict(no_repeat_ngram_size=2), "NoRepeatNGram"), (dict(bad_words_ids=[[4]]), "BadWords"),
    (dict(prompt_lookup_num_tokens=3), "assisted"), (dict(min_new_tokens=3), "MinNewTokens"),
    (dict(output_scores=True, return_dict_in_generate=True), "output_scores"),
    (dict(output_hidden_states=True, return_dict_in_generate=True), "output_hidden_states"),
    (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
    (dict(output_logits=True, return_dict_in_generate=True), "output_logits"),
    (dict(max_time=9.0), "MaxTime"), (dict(stopping_criteria=[FourDivides()]), "FourDivides"),
    (dict(logits_processor=[Favourite()]), "Favourite"),
    (dict(past_key_values=cache_with_tokens), "past_key_values"),
    (dict(token_type_ids=torch.zeros(1, 3, dtype=torch.long)), "token_type_ids")])
def test_models_decoding_refuses_by_name(arguments, name):
    model = base("llama")
    arguments = {key: value() if value is cache_with_tokens else value
                 for key, value in arguments.items()}
    with pytest.raises(ValueError, match=name):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, pad_token_id=0,
                       eos_token_id=3, custom_generate=hydra.decoding(make_heads("hydra", model)),
                       **arguments)


def test_models_decoding_refuses_stop_strings(folder):
    model, _, tokenizer = hydra.load(folder, device="cpu")
    with pytest.raises(ValueError, match="stop string"):  # transformers' own: it needs a tokenizer
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, stop_strings=["tree"],
                       tokenizer=tokenizer, custom_generate=hydra.decoding(None))


def test_models_decoding_refuses_embeddings_in_place_of_tokens():
    model = base("llama")
    embeddings = model.get_input_embeddings()(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=4, pad_token_id=0, eos_token_id=3,
                       custom_generate=hydra.decoding(make_heads("hydra", model)))


def test_models_decoding_takes_an_empty_cache_and_a_mask_of_ones():
    model, ids = base("llama"), torch.tensor([[1, 2, 3]])
    options = dict(max_new_tokens=20, pad_token_id=0, eos_token_id=None, do_sample=False)
    decoding = hydra.decoding(make_heads("hydra", model))
    for more in (dict(past_key_values=transformers.DynamicCache()), dict(),
                 dict(attention_mask=torch.ones_like(ids))):
        got = model.generate(ids, custom_generate=decoding, **options, **more)
        assert got[0, 3:].tolist() == wanted(model, (1, 2, 3), 20)


def test_models_decoding_hands_its_options_on():
    model, ids, recorder = base("llama"), torch.tensor([[1, 2, 3]]), Recorder()
    heads, seen = make_heads("hydra", model), []
    heads.register_forward_hook(lambda _, args, out: seen.append((args[0], out.shape[1])))
    decoding = hydra.decoding(heads, tree=[[0], [3]], streamer=recorder, max_context=12)
    got = model.generate(ids, custom_generate=decoding, max_new_tokens=20, pad_token_id=0,
                         eos_token_id=None, do_sample=False)
    assert sum(recorder.heard, []) == got[0].tolist() and got.shape == (1, 12)
    assert set(seen) == {(0, 1)}  # the tree is one deep
    with pytest.raises(TypeError, match="beam"):
        model.generate(ids, custom_generate=hydra.decoding(heads, beam=3), max_new_tokens=20)


def test_models_decoding_samples_from_the_warped_distribution():
    model, ids = base("llama", initializer_range=0.05), torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    warped = dict(do_sample=True, temperature=0.8, top_k=6, top_p=0.9, min_p=0.02, pad_token_id=0,
                  max_new_tokens=2, eos_token_id=None)
    decoding = hydra.decoding(make_heads("hydra", model))
    texts = [tuple(text[3:]) for text in model.generate(
        ids, num_return_sequences=4000, custom_generate=decoding, **warped).tolist()]
    probs = {}
    for first, p in warped_probs(model, ids, warped).items():
        for second, q in warped_probs(model, torch.cat([ids, torch.tensor([[first]])], 1),
                                      warped).items():
            probs[first, second] = p * q
    assert set(texts) <= set(probs)
    order = sorted(probs)
    assert_distributed(torch.tensor([order.index(text) for text in texts]),
                       torch.tensor([probs[text] for text in order]))


def warped_probs(model, ids, warped):
    """token -> probability, by transformers' own warpers."""
    logits = model(ids).logits[:, -1].float()
    for warper in (transformers.TemperatureLogitsWarper(warped["temperature"]),
                   transformers.TopKLogitsWarper(warped["top_k"]),
                   transformers.TopPLogitsWarper(warped["top_p"]),
                   transformers.MinPLogitsWarper(warped["min_p"])):
        logits = warper(ids, logits)
    probs = logits.softmax(-1)[0]
    return {token: probs[token].item() for token in probs.nonzero()[:, 0].tolist()}


# ---------------------------------------------------------------------------- 10 command line

def run_main(capsys, *args):
    code = hydra.main([*map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def common(folder):
    """Arguments for the model and the heads in folder."""
    return "--model", folder, "--heads", folder / "heads", "--device", "cpu"


SPEED = r" +\d+\.\d\d ms/step +\d+ tokens/s"


def test_command_line_streams_text_and_closes_with_figures(common, capsys):
    code, out, err = run_main(capsys, *common, "--prompt", "the tree", "--max-new-tokens", 20)
    assert code == 0 and out.startswith("the tree") and "\033" not in out
    blank, plain, drafted, gain, grams, memory = err.splitlines()
    assert blank == "" and len(plain) == len(drafted)
    assert re.fullmatch(r"plain decoding +1\.00 tokens/step" + SPEED, plain)
    assert re.fullmatch(r"5 nodes +\d\.\d\d tokens/step" + SPEED, drafted)
    assert re.fullmatch(r"\d+\.\d\d x plain decoding; output identical to plain decoding's", gain)
    assert re.fullmatch(r"\d+% of the text's 4-grams are distinct", grams)
    assert memory == "MiB: base 0, heads 0"
    assert max(map(len, err.splitlines())) <= 80


@pytest.mark.parametrize("with_heads", [True, False])
def test_command_line_decodes_plainly_in_one_line(folder, common, capsys, with_heads):
    args = [*common, "--tree", "none"] if with_heads else ["--model", folder, "--device", "cpu"]
    code, _, err = run_main(capsys, *args, "--prompt", "the tree", "--max-new-tokens", 20)
    blank, plain, grams, memory, *rest = err.splitlines()
    assert code == 0 and blank == ""
    assert re.fullmatch(r"plain decoding +1\.00 tokens/step" + SPEED, plain)
    assert "4-grams" in grams and memory == "MiB: base 0, heads 0"
    assert ["--train TEXT" in line for line in rest] == [True] * (not with_heads)  # how to get some


def test_command_line_sampling_says_that_texts_are_drawn(common, capsys):
    code, _, err = run_main(capsys, *common, "--prompt", "the", "--accept", "sampling")
    assert code == 0 and "; drawn: differs from plain's own draw\n" in err


def test_command_line_figures_are_counted_from_the_output():
    out = hydra.Output(None, [[1] * 6], [[3, 2]], 0.5)  # prefill gave one token of the six
    assert hydra.figures("7 nodes", out) == (
        "7 nodes            2.50 tokens/step  250.00 ms/step     10 tokens/s")
    largest = hydra.Output(None, [[1] * 9001], [[5] * 1800], 0.09)
    assert len(hydra.figures("plain decoding", largest)) <= 80


@pytest.mark.parametrize("tokens, accept, line", [
    ([1, 2, 3], "greedy", "4.00 x plain decoding; output identical to plain decoding's"),
    ([1, 2, 4], "greedy", "4.00 x plain decoding; output not plain decoding's"),
    ([1, 2, 4], "typical", "4.00 x plain decoding; output not plain decoding's"),
    ([1, 2, 4], "sampling", "4.00 x plain decoding; drawn: differs from plain's own draw")])
def test_command_line_comparison_with_plain_decoding(tokens, accept, line):
    plain = hydra.Output(None, [[1, 2, 3]], [[1, 1]], 1.0)
    out = hydra.Output(None, [tokens], [[2]], 0.25)
    assert hydra.comparison(out, plain, accept) == line and len(line) <= 80


@pytest.mark.parametrize("tokens, share", [
    ([1, 2, 3, 4, 1, 2, 3, 4], 4 / 5), ([7] * 13, 1 / 10), ([*range(9)], 1), ([1, 2, 3], 0)])
def test_command_line_counts_distinct_4_grams(tokens, share):
    assert hydra.distinct_4_grams(tokens) == share


@pytest.mark.parametrize("args, length", [
    (["--max-new-tokens", 1], None), (["--max-context", 20], 20), (["--max-new-tokens", 300], 128)])
def test_command_line_stops_where_it_is_told_or_at_the_end_of_the_context(
        common, capsys, args, length, monkeypatch):
    outputs, generate = [], hydra.generate
    monkeypatch.setattr(hydra, "generate", lambda *some, **more: outputs.append(
        generate(*some, **more)) or outputs[-1])
    code, _, err = run_main(capsys, *common, *args, "--prompt", "of the tokens")
    assert code == 0 and "identical" in err
    for out in outputs:  # with the tree, and plainly
        total, new = out.sequences.shape[1], len(out.new_tokens[0])
        assert total == length if length else new == 1


def test_command_line_trees(common, capsys, tmp_path):
    tree = tmp_path / "tree.json"
    tree.write_text("[[0], [0, 1]]")
    args = (*common, "--max-new-tokens", 8, "--prompt", "of the tokens", "--tree")
    runs = [run_main(capsys, *args, name) for name in ("none", tree, "mc_sim_7b_63")]
    assert [code for code, _, _ in runs] == [0] * 3
    assert runs[0][1] == runs[1][1] == runs[2][1] != "of the tokens\n"
    assert [re.findall(r"^\d+ nodes", err, re.M) for _, _, err in runs] == [
        [], ["3 nodes"], ["64 nodes"]]


@pytest.mark.parametrize("content, message", [
    ("null", "no list of choices"), ("{}", "no list of choices"), ("5", "no list of choices"),
    ("[[0], [1, 0]]", "has no parent"), ("[0]", "must be a list of ranks"), ("[[0]", "delimiter")])
def test_command_line_refuses_a_file_that_holds_no_tree(common, capsys, tmp_path, content, message):
    (tmp_path / "tree.json").write_text(content)
    code, out, err = run_main(capsys, *common, "--tree", tmp_path / "tree.json")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_command_line_help_shows_every_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        hydra.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for action in hydra.make_parser()._actions:
        if action.nargs != 0:  # a switch is off
            described = text.rpartition(f" {action.option_strings[-1]} ")[2]
            told = re.search(r"default: ([^)]*)\)|\(no default\)", described)
            assert told
            if action.default is not None:
                assert type(action.default)(told[1]) == action.default


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A text long enough for its last 5 percent to be measured with."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(["the", "tree", "of", "tokens"], k=4000)))
    return path


@pytest.fixture
def training(folder, text_file, tmp_path, monkeypatch):
    """Arguments that train Hydra heads into a folder; the weights each training starts from."""
    starts, fit = [], hydra.fit

    def recorded(module, *args, **options):
        starts.append([weight.detach().clone() for weight in module.parameters()])
        return fit(module, *args, **options)

    monkeypatch.setattr(hydra, "fit", recorded)
    home = tmp_path / "heads"
    args = ("--model", folder, "--device", "cpu", "--train", text_file, "--save", home, "--kind",
            "hydra", "--num-heads", 3, "--steps", 3, "--seq-len", 32, "--batch-size", 2,
            "--max-new-tokens", 8)
    return SimpleNamespace(args=args, home=home, starts=starts)


def test_command_line_trains_heads_and_decodes_with_them(training, folder, capsys):
    code, out, err = run_main(capsys, *training.args, "--prompt", "the tree")
    assert code == 0 and out.startswith("the tree") and "identical to plain decoding's" in err
    model, heads, _ = hydra.load(folder, training.home, "cpu")
    assert heads.config == hydra.HydraConfig(3) and len(training.starts) == 1
    assert not any(map(torch.equal, heads.hydra_lm_head.parameters(), training.starts[0][-6:]))
    nodes = hydra.build_tree(json.loads((training.home / "tree.json").read_text())).num_nodes
    assert nodes > 1 and f"\n{nodes} nodes " in err
    for base_of in (["--model", folder], []):  # the heads know the name of their base
        code, again, err = run_main(capsys, *base_of, "--heads", training.home, "--device", "cpu",
                                    "--prompt", "the tree", "--max-new-tokens", 8)
        assert code == 0 and again == out and "identical to plain decoding's" in err


@pytest.fixture
def quick_tree(monkeypatch):
    """No search for the fastest tree."""
    monkeypatch.setattr(hydra, "fastest_tree", lambda *_: [[0]])


def test_command_line_uses_finished_heads_as_they_are(training, quick_tree, capsys):
    assert run_main(capsys, *training.args)[0] == 0
    files = {path.name: path.read_bytes() for path in training.home.iterdir()}
    code, _, err = run_main(capsys, *training.args, "--steps", 9)
    assert code == 0 and f"{training.home} holds finished heads, used as they are" in err
    assert len(training.starts) == 1
    assert files == {path.name: path.read_bytes() for path in training.home.iterdir()}
    for args, named in ((["--num-heads", 2], "2 of hydra"), (["--kind", "medusa"], "3 of medusa")):
        code, _, err = run_main(capsys, *training.args, *args)
        assert code == 2 and f"{training.home} holds other heads than {named}\n" in err


def test_command_line_goes_on_with_interrupted_training(training, quick_tree, capsys, monkeypatch):
    seen, losses = [], hydra.head_losses

    def interrupted(*args, **options):
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return losses(*args, **options)

    monkeypatch.setattr(hydra, "head_losses", interrupted)
    assert run_main(capsys, *training.args)[:2] == (130, "")
    kept = torch.load(training.home / "hydra_lm_head.pt", weights_only=True)
    assert run_main(capsys, *training.args)[0] == 0
    assert len(training.starts) == 2
    assert all(any(torch.equal(weight, other) for other in kept.values())
               for weight in training.starts[1])
    assert json.loads((training.home / "tree.json").read_text()) == [[0]]


def test_command_line_draws_first_weights_from_the_seed(training, quick_tree, tmp_path, capsys):
    for number, seed in enumerate((0, 0, 1)):
        args = (*training.args, "--save", tmp_path / f"heads{number}", "--seed", seed)
        assert run_main(capsys, *args)[0] == 0
    same = [all(map(torch.equal, training.starts[0], other)) for other in training.starts[1:]]
    assert same == [True, False]


def test_command_line_does_not_save_heads_over_the_model(folder, text_file, capsys):
    code, _, err = run_main(capsys, "--model", folder, "--device", "cpu", "--train", text_file,
                            "--save", folder, "--steps", 1)
    assert code == 2 and "--save" in err and not (folder / "hydra_lm_head.pt").exists()


def test_command_line_trains_the_demo_once(demo, capsys):
    args = ("--device", "cpu", "--max-new-tokens", 8)
    code, out, err = run_main(capsys, *args)
    assert code == 0 and out.startswith("The try statement") and demo == ["cpu"]
    assert err.startswith("hydra.py: training the demo, once") and "5 nodes" in err
    again = run_main(capsys, *args, "--model", "demo")
    assert demo == ["cpu"] and again[:2] == (0, out) and "training" not in again[2]


def test_command_line_trains_no_demo_for_another_model(demo, common, capsys):
    assert run_main(capsys, *common, "--max-new-tokens", 2)[0] == 0
    assert run_main(capsys, "--heads", "./absent", "--device", "cpu")[0] == 2
    assert demo == []


@pytest.mark.parametrize("args, message", [
    (["--prompt", ""], "prompt is empty"), (["--max-new-tokens", "-1"], "max_new_tokens"),
    (["--max-new-tokens", "0"], "max_new_tokens"), (["--max-new-tokens", "-99"], "max_new_tokens"),
    (["--max-context", "2", "--prompt", "of the tokens"], "context of 2"),
    (["--tree", "absent.json"], "absent.json"),
    (["--epsilon", "0"], "epsilon"), (["--temperature", "-1"], "temperature"),
    (["--heads", "absent"], "absent"), (["--model", "./absent"], "base model ./absent"),
    (["--prompt", "the " * 200], "shorten the prompt"), (["--train", __file__], "--save"),
    (["--train", "absent.txt", "--save", "new"], "absent.txt"), (["--device", "abacus"], "abacus")])
def test_command_line_says_what_is_wrong_in_one_line(common, capsys, monkeypatch, args, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run_main(capsys, *common, *args)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("args", [
    ["--accept", "guess"], ["--dtype", "int8"], ["--kind", "eagle"], ["--steps", "few"],
    ["--abacus"]])
def test_command_line_refuses_what_it_does_not_know(capsys, args):
    with pytest.raises(SystemExit, match="^2$"):
        hydra.main(args)
    assert args[0] in capsys.readouterr().err.splitlines()[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps_of_a_terminal(streamer, code):
    """A prompt, " ", then in one step "tree of the"; its bonus token is "he"."""
    streamer.put(torch.tensor([code("the of tree").input_ids]))
    streamer.put(torch.tensor(code(" ").input_ids))
    streamer.put(torch.tensor([*code("tree of ").input_ids, *code("the").input_ids]))
    streamer.end()


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_command_line_colours_accepted_drafts(common, monkeypatch, no_colour):
    def generate(*args, streamer=None, **options):
        if streamer:
            steps_of_a_terminal(streamer, streamer.tokenizer)
        return real(*args, **options)

    real = hydra.generate
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(hydra, "generate", generate)
    assert hydra.main([*map(str, common), "--prompt", "the"]) == 0
    text = sys.stdout.getvalue().replace("\033[0m\033[32m", "")  # printed in pieces
    assert text == "the of tree " + (
        "tree of the\n" if no_colour else "\033[32mtree of \033[0mthe\n")
    assert ("\033[32mgreen\033[0m: accepted drafts" in sys.stderr.getvalue()) == (not no_colour)


def test_command_line_speaks_of_no_colour_without_drafts(common, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    hydra.main([*map(str, common), "--prompt", "the", "--tree", "none", "--max-new-tokens", "9"])
    assert "\033" not in sys.stdout.getvalue() + sys.stderr.getvalue()


def test_command_line_in_a_pipe_is_plain_and_repeatable(common, capsys, monkeypatch):
    script = (reference or hydra).__file__  # the exercises cannot be replaced in another process
    args = [*map(str, common), "--prompt", "-", "--max-new-tokens", "12", "--accept", "sampling",
            "--temperature", "0.8", "--seed"]
    piped = subprocess.run([sys.executable, script, *args, "1"], input="the tree", text=True,
                           capture_output=True, check=True).stdout
    assert piped.startswith("the tree") and "\033" not in piped
    texts = []
    for seed in "12":
        monkeypatch.setattr(sys, "stdin", io.StringIO("the tree\n"))  # as echo sends it
        texts.append(run_main(capsys, *args, seed)[1])
    assert texts[0] == piped != texts[1]


def test_command_line_with_torchrun_writes_what_one_process_writes(common, capsys):
    """Two processes that share the base's weights: tensor parallelism, here over gloo."""
    script = (reference or hydra).__file__
    args = [*map(str, common), "--prompt", "the tree", "--max-new-tokens", "20"]
    both = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script,
                           *args], text=True, capture_output=True)
    assert both.returncode == 0, both.stderr
    assert both.stdout == run_main(capsys, *args)[1]
    assert "identical to plain" in both.stderr and both.stderr.count("5 nodes") == 1


def test_command_line_keeps_a_chat_template_and_its_bos(tmp_path, capsys, monkeypatch):
    home, heard, generate = tmp_path / "vicuna-of-mine", [], hydra.generate
    write_vicuna(home)
    about = json.loads((home / "tokenizer_config.json").read_text())
    about["chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    (home / "tokenizer_config.json").write_text(json.dumps(about))

    def recorded(model, heads, ids, **options):
        heard.append((ids[0].tolist(), options["cuda_graph"]))
        return generate(model, heads, ids, **options)

    monkeypatch.setattr(hydra, "generate", recorded)
    run_main(capsys, "--model", home, "--device", "cpu", "--prompt", "tree", "--max-new-tokens", 2,
             "--no-cuda-graph")
    (ids, cuda_graph), *_ = heard
    assert hydra.load(home, device="cpu")[2].decode(ids[1:]).strip() == "tree"
    assert ids.count(1) == 1 and ids[0] == 1 and cuda_graph is False


@pytest.mark.parametrize("args, prompt", [
    ([], "The try statement"), (["--raw"], "The try statement"), (["--prompt", "of"], "of")])
def test_command_line_has_a_prompt_that_fits(common, capsys, args, prompt):
    code, out, _ = run_main(capsys, *common, *args, "--max-new-tokens", 2)
    assert code == 0 and out.startswith(prompt)


@pytest.fixture
def heard(monkeypatch):
    """The options of every call of generate."""
    options_of, generate = [], hydra.generate

    @wraps(generate)
    def recorded(*args, **options):
        options_of.append(options)
        return generate(*args, **options)

    monkeypatch.setattr(hydra, "generate", recorded)
    return options_of


def test_command_line_hands_its_settings_to_generate(common, capsys, heard):
    settings = dict(accept="typical", temperature=0.7, epsilon=0.2, delta=0.6, max_new_tokens=9,
                    max_context=40)
    args = [text for name, value in settings.items()
            for text in ("--" + name.replace("_", "-"), value)]
    run_main(capsys, *common, *args, "--prompt", "the")
    assert len(heard) == 2  # with the tree, and plainly
    for options in heard:
        assert {name: options[name] for name in settings} == settings
        assert (options["cuda_graph"], options["compile"]) == (None, False)


def test_command_line_has_the_defaults_of_generate(common, capsys, heard):
    run_main(capsys, *common, "--prompt", "the")
    defaults = inspect.signature(hydra.generate).parameters
    for name, value in heard[1].items():
        assert name == "tree" or value == defaults[name].default


@pytest.mark.parametrize("error, code, message", [
    (KeyboardInterrupt(), 130, ""), (RuntimeError("a\n b"), 2, "hydra.py: a b\n"),
    (OSError("no space"), 2, "hydra.py: no space\n"), (ValueError("bad"), 2, "hydra.py: bad\n"),
    (torch.OutOfMemoryError("full"), 2,
     "hydra.py: full; use a smaller --tree, --max-context or --batch-size\n")])
def test_command_line_exit_codes(error, code, message, capsys, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr(hydra, "run", fail)
    assert run_main(capsys) == (code, "", message)


# ------------------------------------------------------------------------- the file as a whole

EXAMPLES = [test for test in doctest.DocTestFinder().find(reference or hydra) if test.examples]


def part_one():
    """What stands in hydra.py above the line that opens Part II."""
    above, opening, _ = re.split(r"(^#.*Part II.*\n)", inspect.getsource(reference or hydra),
                                 maxsplit=1, flags=re.M)
    return above, opening


def test_part_one_is_cut_off_by_one_line():
    lines = inspect.getsource(reference or hydra).splitlines()
    openings = [line for line in lines if line.startswith("#") and "Part II" in line]
    assert len(openings) == 1
    assert not re.search(r"#.*Part II", part_one()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_part_one_is_a_program_that_decodes_by_itself(kind, tmp_path):
    (tmp_path / "part_one.py").write_text(part_one()[0], "utf-8")
    spec = importlib.util.spec_from_file_location("part_one", tmp_path / "part_one.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    model, prompts = base("llama-gqa"), random_prompts(71, 5, 1, 12)
    ids, mask = pad(prompts, "left")
    heads = alone.DraftHeads(alone.HydraConfig(**alone.KINDS[kind]), model)
    for tree in (random_choices(71), alone.build_tree(random_choices(72)), None):
        output = alone.generate(model, heads, ids, attention_mask=mask, tree=tree,
                                max_new_tokens=40)
        assert_greedy(model, prompts, output, 40)
    assert not hasattr(alone, "train_heads") and not hasattr(alone, "argparse")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name.split(".")[-1])
def test_docstring_example(example):
    example.globs = dict(vars(hydra))
    assert doctest.DocTestRunner().run(example).failed == 0


def test_handout_is_the_file_without_the_answers():
    blank, source = handout(), inspect.getsource(reference or hydra)
    before, after = ({node.name: node for node in ast.parse(text).body
                      if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
                     for text in (source, blank))
    assert list(before) == list(after)
    for name, node in after.items():
        assert ast.get_docstring(node) == ast.get_docstring(before[name])
        if name in EXERCISES:
            assert ast.unparse(node.body[1:]) == "raise NotImplementedError"
        else:
            assert ast.unparse(node) == ast.unparse(before[name])
    assert blank.count("raise NotImplementedError") == len(EXERCISES)


# --------------------------------------------------------------------------------- autograder

for function in (test_tree_attention_mask_running_example,
                 test_tree_attention_mask_is_ancestor_or_self):
    function.tree_mask = True  # so that -k tree_mask finds them too


def run_submission(source, seconds, *args):
    """Run python with args in a folder of its own, beside source (bytes) as submission.py.

    Returns the exit code, or None when time was up; what was written to standard error; and to
    report.xml. Whatever the submission does, it does there: loop, exit, print, crash.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors, report = Path(folder, "errors.txt"), Path(folder, "report.xml")
        Path(folder, "submission.py").write_bytes(source)
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        settings = dict(HYDRA="submission", HYDRA_REF="hydra", PYTHONPATH=path, PYTEST_ADDOPTS="")
        with errors.open("wb") as stderr:
            try:
                code = subprocess.run([sys.executable, *args], cwd=folder, timeout=seconds,
                                      env=os.environ | settings, stdin=subprocess.DEVNULL,
                                      stdout=subprocess.DEVNULL, stderr=stderr).returncode
            except subprocess.TimeoutExpired:
                code = None
        return code, errors.read_text(errors="replace"), report.exists() and report.read_bytes()


def why_not_imported(source, seconds):
    """Why the submission cannot be imported, in one line; "" when it can."""
    code, errors, imported = run_submission(
        source, seconds, "-c", "import submission; open('report.xml', 'w').write('imported')")
    if imported:
        return ""
    lines = re.findall(r'submission.py", line (\d+)', errors)
    why = errors.strip().split("\n")[-1] or "it ends the process"
    why = f"it takes longer than {seconds:g} s" if code is None else why
    return "cannot be imported: " + why + (f" (line {lines[-1]})" if lines else "")


def result(points=0, passed=0, failed=0, note=""):
    return {"points": points, "of": POINTS, "passed": passed, "failed": failed, "note": note}


def grade_exercise(source, seconds, name):
    """The result of one exercise: its tests in their own process, all else from the reference."""
    here = Path(__file__).resolve()
    code, _, report = run_submission(
        source, seconds, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", here.parent,
        "--junitxml", "report.xml", "-k", name, here)
    if not report or code not in (0, 1):  # pytest could not finish
        return result(note=f"stopped after {seconds:g} s" if code is None else
                      "it ended the process")
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    problems = [case[0].get("message", "") for case in cases if len(case)]
    solved, note = code == 0 and not problems, [*problems, ""][0].strip().split("\n")[0][:70]
    return result(POINTS * solved, len(cases) - len(problems), len(problems), note)


def grade(source, seconds, exercises):
    """Yield (exercise, its result) in order; two are graded at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield from zip(exercises, pool.map(partial(grade_exercise, source, seconds), exercises))


def grade_file(name, seconds, as_json):
    """Print the results as a table, line by line as they come, or as JSON; the exit code."""
    try:
        source = Path(name).read_bytes()
    except OSError as error:
        print(f"test_hydra.py: cannot read {name}: {error.strerror}", file=sys.stderr)
        return 2
    show = (lambda *args: None) if as_json else partial(print, flush=True)
    note = why_not_imported(source, seconds)
    results = {exercise: result(note=note) for exercise in EXERCISES}
    if note:
        show(name, note)
    for exercise, one in () if note else grade(source, seconds, EXERCISES):
        results[exercise] = one
        show("{:20} {points:3} of {of}  {passed:3} passed {failed:3} failed  {note}".format(
            exercise, **one).rstrip())
    total, most = sum(one["points"] for one in results.values()), POINTS * len(EXERCISES)
    show(f"{'total':20} {total:3} of {most}")
    if as_json:
        print(json.dumps({"exercises": results, "total": total, "of": most}, indent=1))
    return 0


def test_grading_gives_the_points_of_what_is_solved():
    """One exercise solved; one that ends the process, which costs its own points only."""
    solved, exits = EXERCISES[0], EXERCISES[7]
    source = handout([name for name in EXERCISES if name != solved], "import os; os._exit(0)")
    results = dict(grade(source.encode(), 120, [solved, exits]))
    assert results[solved]["points"] == POINTS and results[solved]["passed"] > 0
    assert results[exits] == result(note="it ended the process")


@pytest.mark.parametrize("source, seconds, note", [
    ("x = 1\ndef f(:\n", 60, "SyntaxError: invalid syntax (line 2)"),
    ("exit()", 60, "it ends the process"), ("while True: pass", 1, "longer than 1 s")])
def test_grading_says_why_a_file_cannot_be_imported(source, seconds, note):
    why = why_not_imported(source.encode(), seconds)
    assert why.startswith("cannot be imported: ") and why.endswith(note) and "\n" not in why


# --------------------------------------------------------------------------------- step times

STEPS = "batch  nodes   slots  ms/step  with host read   GB read  GB/s  of copying  pays above"


def random_7b(device):
    """A base of Vicuna-7B's shapes and Hydra++ heads, with random weights; nothing to download."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig()).eval()  # its defaults
        heads = hydra.DraftHeads(hydra.HydraConfig(**hydra.KINDS["hydra++"]), model)
    torch.set_default_dtype(torch.float32)
    return model, heads


def seconds(call, repeats=5, number=10):
    """Median seconds of a call; on a GPU the wait for it is in there, once in number calls."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return sorted(timer.timeit(number).mean for _ in range(repeats))[repeats // 2]


def recorded(call):
    """The call as a CUDA graph's replay."""
    graph = torch.cuda.CUDAGraph()
    call()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def phase_seconds(decoder, cuda_graph):
    """Seconds of a step's phases, each timed alone, under a CUDA graph of its own if so asked."""
    tree, cache = decoder.tree, decoder.cache
    positions = decoder.length[:, None] + tree.depths
    draft = partial(hydra.draft_tree, decoder.heads, tree, decoder.root, decoder.hidden,
                    decoder.embed)
    tokens = draft()
    verify = partial(decoder.forward, decoder.model, tokens, positions, tree.mask)
    out, _ = verify()
    accept = partial(decoder.accept, tokens, out.logits, tree)
    node, slots = accept()[0], cache.slots

    def commit():
        kept = tree.mask[node] & (positions < decoder.max_context)
        hydra.commit_path(cache.slot_positions, slots, positions, kept)

    # commit comes last, for it takes slots
    phases = dict(draft=draft, verify=verify, accept=accept, commit=commit)
    return {name: seconds(recorded(call) if cuda_graph else call) for name, call in phases.items()}


@torch.inference_mode()
def print_steps(model, heads, batches, sizes, committed=256, context=2048, compile=False,
                cuda_graph=None):
    """Print what one step costs, for batches and trees; not compiled, also the library's loops.

    A step reads the weights of base and heads once; copying as many bytes is what it is measured
    against.  pays above: how many tokens per step a tree has to give to beat plain decoding.  The
    phases are those of the first batch's last tree.
    """
    device, plain, phases = model.device, {}, ""
    size = 2 ** (30 if device.type == "cuda" else 26)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    speed = 2 * len(block) / seconds(lambda: target.copy_(block))
    on_gpu = device.type == "cuda"
    how = ["compiled"] * compile + ["CUDA graph"] * (on_gpu and cuda_graph is not False)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {model.dtype}, {committed} tokens "
          f"committed of {context}, step: {', '.join(how) or 'eager'}; copying: "
          f"{speed / 1e9:.0f} GB/s\n{STEPS}")
    del block, target
    best = sorted(hydra.MC_SIM_7B_63, key=lambda choice: (sum(choice), len(choice)))
    depth = heads.config.num_heads
    best = [choice for choice in best if len(choice) <= depth]
    embedding = sum(weight.nbytes for weight in model.get_input_embeddings().parameters())
    prompt = torch.randint(model.config.vocab_size, (1, committed), device=device)
    for batch, size in itertools.product(batches, sizes):
        used = heads if size > 1 else None
        decoder = hydra.Decoder(model, used, hydra.build_tree(best[:size - 1]), batch, context,
                                compile=compile, cuda_graph=cuda_graph)
        decoder.prefill(prompt.expand(batch, -1))
        slot_positions = decoder.cache.slot_positions.clone()

        def step(read=lambda result: None):
            read(decoder.step(committed))  # the slots read stay, whatever is accepted

        def rewind():
            decoder.length.fill_(committed)
            decoder.cache.slot_positions.copy_(slot_positions)

        bare = seconds(step)
        rewind()
        read = seconds(partial(step, lambda result: [part.tolist() for part in result]))
        plain.setdefault(batch, bare)
        weights = sum(part.nbytes for module in (model, used) if module
                      for part in module.parameters()) - embedding
        print(f"{batch:5}{size:7}{decoder.cache.slots_read:8}{1e3 * bare:9.2f}{1e3 * read:16.2f}"
              f"{weights / 1e9:10.2f}{weights / bare / 1e9:6.0f}{weights / bare / speed:12.0%}"
              f"{bare / plain[batch]:12.2f}", flush=True)
        if used and (batch, size) == (batches[0], sizes[-1]) and not compile:
            rewind()
            times = phase_seconds(decoder, on_gpu and cuda_graph is not False).items()
            phases = ", ".join(f"{phase} {1e3 * time:.2f}" for phase, time in times)
        decoder = step = rewind = None
    if phases:
        print(f"phases of {sizes[-1]} nodes, batch {batches[0]}, in ms: {phases}")
    others = {}, {"prompt_lookup_num_tokens": 10}, {"cache_implementation": "static"}
    for more in () if compile else others:
        ids = prompt[:, :32]
        call = partial(model.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False,
                       max_new_tokens=32, min_new_tokens=32, **more)
        print(f"{' '.join(['model.generate', *more]):48}{1e3 * seconds(call, 1, 1) / 32:8.2f} ms a "
              "token, batch 1, 32 new tokens", flush=True)


def test_steps_table_has_a_line_for_each_batch_and_tree(capsys):
    model = base("llama", max_position_embeddings=400)
    print_steps(model, make_heads("hydra++", model), [1, 2], [1, 8], 16, 300)
    about, header, *rows = capsys.readouterr().out.splitlines()
    assert about.startswith("CPU, torch.float32, 16 tokens committed of 300, step: eager;")
    assert header == STEPS
    assert [row.split()[:3] for row in rows[:4]] == [
        [batch, nodes, str(300 + int(nodes))] for batch in "12" for nodes in "18"]
    assert [row.split()[-1] == "1.00" for row in rows[:4]] == [True, False] * 2
    assert rows[4].startswith("phases of 8 nodes, batch 1, in ms: ")
    assert rows[4].split()[8::2] == ["draft", "verify", "accept", "commit"]
    assert [row.split()[0] for row in rows[5:]] == ["model.generate"] * 3


# ------------------------------------------------------------------------------------- the lab

TABLE = """\
                          tokens     ms tokens     x distinct    as         real
method              nodes  /step  /step     /s plain  4-grams plain sampled text"""
LINE = "{:20.20}{:>5}{:>7}{:>7}{:>7}{:>6}{:>9}{:>6}{:>8}{:>5}"
BASELINES = {  # what transformers itself offers
    "model.generate": {},
    "prompt lookup": dict(prompt_lookup_num_tokens=10),
    "static cache": dict(cache_implementation="static"),
}
progress = partial(tqdm, delay=3, leave=False, disable=None)  # a bar, if it takes that long


def replay(ranks, choices):
    """Tokens per step that decoding would give, from ranks (B, M, K) along what it would write.

    A step accepts the longest choice that the ranks at its position start with; the next step
    stands behind the tokens of this one.

    >>> ranks = torch.tensor([[[0, 0], [1, 0], [0, 0], [0, 1], [0, 0]]])
    >>> replay(ranks, [[0], [1], [0, 0]])  # 3 tokens, then 2: [0, 1] is no choice
    2.5
    """
    choices = set(map(tuple, choices))
    emitted = []
    for row in ranks.tolist():
        while row:
            paths = itertools.accumulate((rank,) for rank in row[0])  # (r0,), (r0, r1), ...
            emitted.append(1 + sum(path in choices for path in paths))
            row = row[emitted[-1] :]
    return sum(emitted) / max(len(emitted), 1)


def read_prompts(path, count):
    """At most count prompts of a file, evenly spread: MT-Bench is sorted by category."""
    (text,) = hydra.read_texts([path])
    prompts = [line for line in text.splitlines() if line.strip()]
    if Path(path).suffix == ".jsonl":
        try:
            prompts = [json.loads(line)["turns"][0] for line in prompts]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f'{path}: each line must be {{"turns": ["...", ...]}}') from error
    hydra.require(prompts, f"{path} holds no prompts")
    return prompts[:: max(1, len(prompts) // count)][:count]


def read_inputs(args, model, tokenizer, is_demo):
    """Ids to train on and to choose trees with; prompts, (1, T) each; and real text (n, T).

    Without a text there are no ids, and the real text is None: --heads and --prompts need none.
    """
    texts = hydra.read_texts(args.train or [])
    if is_demo and not texts:
        texts = [hydra.demo_text()]
    train_ids, tree_ids, rest = hydra.encode(tokenizer, texts)
    real_text = hydra.cut(rest, 16, 160, model.device) if texts else None
    if not args.train:  # the demo's base and its Hydra++ heads have learned all of its text
        train_ids = tree_ids = torch.cat([train_ids, tree_ids, rest])

    if args.prompts:
        is_chat = bool(tokenizer.chat_template)
        lines = read_prompts(args.prompts, args.num_prompts)
        prompts = [hydra.encode_prompt(tokenizer, line, is_chat) for line in lines]
    else:
        prompts = hydra.cut(rest, args.num_prompts, 32, model.device).split(1)
    return train_ids, tree_ids, [ids.to(model.device) for ids in prompts], real_text


def decode_all(args, model, prompts, max_context, heads, tree, rule, compile=False):
    """Decode prompts (1, T) one at a time, with one Decoder: their Outputs, joined to one."""
    decoder = hydra.Decoder(model, heads, tree, 1, max_context, rule,
                            cuda_graph=args.cuda_graph, compile=compile)

    # a step is compiled and recorded for each number of slots: all of them before the clock runs
    decoder.prefill(prompts[0])
    for length in (*range(1, max_context, 256), max_context):
        decoder.step(length)

    torch.manual_seed(0)
    total = hydra.Output(None, [], [], 0.0)
    for ids in progress(prompts, "decoding"):
        out = hydra.decode(decoder, ids, max_new_tokens=args.max_new_tokens)
        total.new_tokens += out.new_tokens
        total.emitted += out.emitted
        total.seconds += out.seconds
    return total


def rate(out):
    """Tokens a second of such an Output; prefill gave the first token of each row."""
    num_tokens = sum(map(len, out.new_tokens)) - len(out.new_tokens)
    return num_tokens / max(out.seconds, 1e-9)


def generate_rate(model, prompts, **options):
    """Tokens a second of `model.generate`; the step that reads the prompt counts, and its token."""
    for _ in range(2):  # a static cache compiles the first time, which is not counted
        num_tokens = 0
        start = time.perf_counter()
        for ids in progress(prompts, "model.generate"):
            mask = torch.ones_like(ids)
            text = model.generate(ids, attention_mask=mask, do_sample=False, **options)
            num_tokens += text.shape[1] - ids.shape[1]
        text.tolist()  # a GPU is done when this is read
    return num_tokens / (time.perf_counter() - start)


def figures(name, tree, out, plain, sampled="-", on_text="-"):
    """A method's line: its Output beside plain decoding's, and two figures of other text."""
    rows = out.new_tokens
    num_steps = sum(map(len, out.emitted))
    milliseconds = 1000 * out.seconds / max(num_steps, 1)
    gain = rate(out) / (rate(plain) or math.nan)
    distinct = sum(map(hydra.distinct_4_grams, rows)) / len(rows)
    num_equal = sum(map(list.__eq__, rows, plain.new_tokens))
    return LINE.format(
        name,
        tree.num_nodes,
        f"{out.tokens_per_step:.2f}",
        f"{milliseconds:.2f}",
        f"{rate(out):.0f}",
        f"{gain:.2f}",
        f"{distinct:.0%}",
        f"{num_equal}/{len(rows)}",
        sampled,
        on_text,
    )


def about(args, model, num_prompts):
    """What is compared, in two lines."""
    name = Path(model.config.name_or_path).name
    device = f"{torch.get_num_threads()}-thread CPU"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name()
    rule = "greedy" if args.accept == "greedy" else f"{args.accept} at {args.temperature:g}"
    return (f"{name}, {model.dtype}, {device}, torch {torch.__version__}\n"
            f"{num_prompts} prompts, {args.max_new_tokens} new tokens each, {rule}")


def print_table(args, model, methods, prompts, real_text, rule, decode):
    """A line for plain decoding, two for each of methods (name, heads), as soon as it is known.

    real_text: ids (n, T) to replay trees on, or None.  decode: `decode_all` for these prompts.
    """
    say = partial(print, flush=True)
    say(about(args, model, len(prompts)))
    say(TABLE)

    # the same loop with a tree of one node: what all others are measured against
    one_node = hydra.build_tree([])
    plain = decode(None, one_node, rule, args.compile)
    say(figures("plain", one_node, plain, plain))

    for name, heads in methods:
        # the paper's tree, as far as these heads reach, is that of heads without one of their own
        bare = copy.copy(heads)
        bare.choices = None
        usual = hydra.choose_tree(bare, None)
        ranks = None if real_text is None else hydra.head_ranks(model, heads, real_text)
        for label, tree in ((name, heads.choices), (f"{name:.12}, mc_sim", usual)):
            if tree is None:  # as released
                continue
            tree = hydra.choose_tree(heads, tree)
            out = decode(heads, tree, rule, args.compile)

            # greedy text repeats itself, which flatters every method; drawn and real text do not
            drawn = decode(heads, tree, partial(hydra.accept_sampling, temperature=1.0))
            on_text = "-" if ranks is None else f"{replay(ranks, tree.choices):.2f}"
            say(figures(label, tree, out, plain, f"{drawn.tokens_per_step:.2f}", on_text))

    # in another loop than ours: how fast, and no more
    for name, options in BASELINES.items() if args.baselines else ():
        speed = generate_rate(model, prompts[:4], max_new_tokens=args.max_new_tokens, **options)
        gain = speed / (rate(plain) or math.nan)
        say(LINE.format(name, *"---", f"{speed:.0f}", f"{gain:.2f}", *"----"))


def compare(args):
    """--compare: train the draft heads that are missing, decode with all, print the table."""
    is_demo = args.model == "demo" or not (args.model or args.heads)
    is_enough = is_demo or args.train or (args.heads and args.prompts)
    is_paired = bool(args.train) == bool(args.save)
    advice = "give --train TEXT with --save FOLDER, or --heads with --prompts FILE"
    hydra.require(is_enough and is_paired, advice)
    is_positive = min(args.num_prompts, args.max_new_tokens) > 0
    hydra.require(is_positive, "--num-prompts and --max-new-tokens must be 1 or more")
    rule = hydra.choose_acceptance(args.accept, args.temperature, epsilon=0.09, delta=0.3)
    transformers.utils.logging.disable_progress_bar()
    if is_demo and not hydra.demo_folder().exists():
        print("test_hydra.py: training the demo, once: two or three minutes", file=sys.stderr)
        hydra.train_demo(args.device or "cpu")

    # read all there is, and see whether it fits, before anything is trained
    paths = args.heads or []
    first = paths[0] if paths else None  # names the base, if --model does not
    model, _, tokenizer = hydra.load(args.model, first, args.device, args.dtype)
    methods = []
    for path in paths:
        methods.append((Path(path).name, hydra.DraftHeads.from_pretrained(path, model)))
    train_ids, tree_ids, prompts, real_text = read_inputs(args, model, tokenizer, is_demo)
    max_context = max(ids.shape[1] for ids in prompts) + args.max_new_tokens
    hydra.check_fit(model, None, hydra.build_tree([]), max_context)

    # each kind is saved when it is trained, so that an interrupted run goes on
    defaults = hydra.DEMO_TRAINING if is_demo else dict(batch_size=8, seq_len=128, lr=1e-3)
    training = {name: getattr(args, name) or default for name, default in defaults.items()}
    for kind in args.kinds if len(train_ids) else ():
        torch.manual_seed(0)  # first weights are drawn
        folder = Path(args.save or hydra.demo_folder(), kind)
        heads = hydra.make_heads(kind, model, train_ids, tree_ids, folder, args.num_heads,
                                 steps=args.steps_of_training, **training)
        methods.append((kind, heads))

    decode = partial(decode_all, args, model, prompts, max_context)
    print_table(args, model, methods, prompts, real_text, rule, decode)
    return 0


def add_compare_options(parser):
    """Options of `compare`; --model, --compile and --no-cuda-graph it shares with --steps."""
    add = parser.add_argument_group("for --compare").add_argument
    add("--heads", nargs="+", metavar="DIR_OR_REPO", help="draft heads that are there already")
    add("--prompts", metavar="FILE", help="MT-Bench's .jsonl, or text with a prompt a line "
        "(default: windows of the last 5 percent of the text)")
    add("--train", nargs="+", metavar="TEXT", help="files to train heads on (demo: its own text)")
    add("--save", metavar="DIR", help="folder for these heads, with a folder for each kind")
    add("--kinds", nargs="+", choices=hydra.KINDS, default=[*hydra.KINDS], help="default: all")
    add("--accept", choices=["greedy", "sampling", "typical"], default="greedy")
    add("--dtype", choices=["float32", "float16", "bfloat16"])
    add("--device", help="default: cuda if there is one")
    add("--baselines", action="store_true", help="also model.generate's own ways, on 4 prompts")
    for name, default in (("--num-prompts", 8), ("--max-new-tokens", 128), ("--temperature", 1.0),
                          ("--steps-of-training", 600), ("--num-heads", 4)):
        add(name, type=type(default), default=default, help=f"default: {default}")
    for name, kind in (("--batch-size", int), ("--seq-len", int), ("--lr", float)):
        add(name, type=kind, help="of training; default: as in hydra.py")


# ------------------------------------------------------------------- tests of the comparison


@pytest.mark.parametrize("ranks, choices, tokens_per_step", [
    ([[[0, 0]] * 6], [[0], [0, 0]], 3),
    ([[[0, 0]] * 6], [[0]], 2),
    ([[[0, 0]] * 6], [], 1),
    ([[[0, 0], [1, 0], [0, 0], [0, 1], [0, 0]]], [[0], [1], [0, 0]], 5 / 2),  # 3 tokens, then 2
    ([[[1, 0], [0, 0], [9, 0]]], [[0], [0, 0]], 4 / 2),  # 1, then 3; [9, 0] is passed over
    ([[[0, 5], [0, 0], [0, 0], [4, 0]], [[4, 4]] * 4], [[0], [0, 0]], 9 / 6),  # 2, 3; 1, 1, 1, 1
])
def test_lab_replay_counts_the_positions_where_steps_begin(ranks, choices, tokens_per_step):
    assert replay(torch.tensor(ranks), choices) == tokens_per_step


def test_lab_replay_of_nothing():
    assert replay(torch.zeros(2, 0, 4), SEVEN) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_lab_replay_equals_real_decoding(kind):
    model = base("llama")
    heads = make_heads(kind, model)
    choices = [[rank] for rank in range(20)] + [[rank, 1] for rank in range(20)]
    ids = torch.tensor(random_prompts(3, 4, 4, 4))
    out = hydra.generate(model, heads, ids, tree=choices, max_new_tokens=92)
    ranks = hydra.head_ranks(model, heads, out.sequences)[:, 3:]  # from the first step's position

    counts = []
    for row in out.emitted:
        starts = itertools.accumulate(row, initial=0)
        counts += [count for count, start in zip(row, starts) if start < ranks.shape[1]]
    assert {1, 2, 3} == {*counts}
    assert replay(ranks, choices) == sum(counts) / len(counts)


def test_lab_prompts_are_spread_over_the_file(tmp_path):
    lines = [json.dumps({"question_id": k, "turns": [f"prompt {k}", "more"]}) for k in range(80)]
    (tmp_path / "bench.jsonl").write_text("\n".join(lines))
    prompts = read_prompts(tmp_path / "bench.jsonl", 8)
    assert prompts == [f"prompt {k}" for k in range(0, 80, 10)]


def test_lab_prompts_stand_in_the_lines_of_a_text(tmp_path):
    (tmp_path / "prompts.txt").write_text("the tree\n\nof \"the\" tokens\n")
    assert read_prompts(tmp_path / "prompts.txt", 8) == ["the tree", 'of "the" tokens']


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"turns": []}', '{"prompt": "a"}'])
def test_lab_prompts_that_are_none_name_the_file(line, tmp_path):
    (tmp_path / "bench.jsonl").write_text(line)
    with pytest.raises(ValueError, match="bench.jsonl: each line must be .*turns"):
        read_prompts(tmp_path / "bench.jsonl", 1)


def test_lab_figures_are_counted_from_the_outputs():
    plain = hydra.Output(None, [[1] * 6, [7, 8]], [[1] * 5, [1]], 2.0)
    drafted = hydra.Output(None, [[1] * 6, [7, 9]], [[3, 2], [2]], 0.5)
    one_node, seven = hydra.build_tree([]), hydra.build_tree(SEVEN)

    # a row's first token is prefill's; rows with 3 and 0 4-grams, 1 of them distinct
    line = figures("plain", one_node, plain, plain)
    assert line.split() == ["plain", "1", "1.00", "333.33", "3", "1.00", "17%", "2/2", "-", "-"]
    line = figures("drafted", seven, drafted, plain, "1.50", "2.50")
    assert line.split()[1:] == [
        "7", "2.33", "166.67", "12", "4.00", "17%", "1/2", "1.50", "2.50"]


@pytest.fixture
def lab(capsys, monkeypatch):
    """`python test_hydra.py --compare` on a CPU: exit code, lines of the table, of the rest."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)

    def run(*args):
        code = main([*map(str, ["--compare", "--device", "cpu", *args])])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("the tree\nof the tokens\n")
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A text long enough for its last 5 percent to be measured with."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(["the", "tree", "of", "tokens"], k=4000)))
    return path


def method(line):
    return line[:20].strip()


def test_lab_table_of_given_heads(folder, prompt_file, tmp_path, lab):
    released = tmp_path / "a-name-as-long-as-any-on-the-hub"
    shutil.copytree(folder / "heads", released)
    (released / "tree.json").unlink()
    code, lines, _ = lab("--model", folder, "--heads", folder / "heads", released, "--prompts",
                         prompt_file, "--max-new-tokens", 12, "--baselines")
    assert code == 0 and max(map(len, lines)) <= 80
    assert lines[:2] == [
        f"{folder.name}, torch.float32, {torch.get_num_threads()}-thread CPU, "
        f"torch {torch.__version__}", "2 prompts, 12 new tokens each, greedy"]

    rows = [(method(line), *line[20:].split()) for line in lines[4:]]
    assert [row[:2] for row in rows] == [
        ("plain", "1"), ("heads", "5"), ("heads, mc_sim", "64"), ("a-name-as-lo, mc_sim", "64"),
        ("model.generate", "-"), ("prompt lookup", "-"), ("static cache", "-")]
    assert rows[0][2] == rows[0][5] == "1.00"
    assert {row[7] for row in rows[:4]} == {"2/2"}  # as plain
    assert {row[9] for row in rows[:4]} == {"-"}  # there is no real text
    assert all(float(row[8]) >= 1 for row in rows[1:4])  # sampled
    assert all(float(row[4]) > 0 and [*row[6:]] == ["-"] * 4 for row in rows[4:])


def test_lab_trains_what_is_missing(folder, text_file, tmp_path, lab, monkeypatch):
    titles, fit = [], hydra.fit

    @wraps(fit)
    def recorded(*args, title, **options):
        titles.append(title)
        assert options == dict(steps=2, batch_size=3, seq_len=32, lr=1e-3, labels=None)
        return fit(*args, title=title, **options)

    monkeypatch.setattr(hydra, "fit", recorded)
    monkeypatch.setattr(hydra, "fastest_tree", lambda *_: [[0], [0, 1]])  # a minute's work
    args = ("--model", folder, "--train", text_file, "--save", tmp_path, "--steps-of-training", 2,
            "--batch-size", 3, "--seq-len", 32, "--num-heads", 3, "--num-prompts", 2,
            "--max-new-tokens", 8)
    code, lines, _ = lab(*args, "--kinds", "medusa", "hydra")
    assert code == 0 and titles == ["medusa", "hydra"]
    assert all(float(line.split()[-1]) >= 1 for line in lines[5:])  # real text

    code, lines, _ = lab(*args)
    assert code == 0 and titles == ["medusa", "hydra", "hydra++"]
    assert list(map(method, lines[4:])) == [
        "plain", "medusa", "medusa, mc_sim", "hydra", "hydra, mc_sim", "hydra++",
        "hydra++, mc_sim"]
    assert all(" 2/2 " in line for line in lines[4:])
    for kind in KINDS:
        _, heads, _ = hydra.load(folder, tmp_path / kind, "cpu")
        assert heads.choices and heads.config == hydra.HydraConfig(3, **KINDS[kind])


def test_lab_demo_teaches_all_kinds_what_its_own_heads_learned(folder, tmp_path, lab, monkeypatch):
    def train_demo(device):
        shutil.copytree(folder, hydra.demo_folder())
        shutil.copytree(folder / "heads", hydra.demo_folder() / "hydra++")

    def make_heads(kind, model, train_ids, tree_ids, path, num_heads, **options):
        heard.append((kind, len(train_ids), len(tree_ids), path, num_heads, options))
        return hydra.DraftHeads.from_pretrained(folder / "heads", model)

    heard = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hydra, "train_demo", train_demo)
    monkeypatch.setattr(hydra, "make_heads", make_heads)
    code, lines, errors = lab("--max-new-tokens", 4, "--num-prompts", 1, "--lr", 0.5)
    assert code == 0 and len(lines) == 11 and "training the demo" in errors[0]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer(hydra.demo_text()).input_ids)
    options = dict(steps=600) | hydra.DEMO_TRAINING | dict(lr=0.5)
    assert heard == [
        (kind, size, size, hydra.demo_folder() / kind, 4, options) for kind in KINDS]


def test_lab_decodes_as_asked(folder, prompt_file, lab, monkeypatch):
    """Sampled figures know no speed, so nobody waits for their step to be compiled."""
    class Recorded(hydra.Decoder):
        def __init__(self, model, heads, tree, batch_size, max_context, accept, **options):
            heard.append((tree.num_nodes, max_context, getattr(accept, "func", accept), options))
            super().__init__(model, heads, tree, batch_size, max_context, accept)

    heard = []
    monkeypatch.setattr(hydra, "Decoder", Recorded)
    code, *_ = lab("--model", folder, "--heads", folder / "heads", "--prompts", prompt_file,
                   "--max-new-tokens", 8, "--accept", "typical", "--compile", "--no-cuda-graph")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    context = len(tokenizer("of the tokens").input_ids) + 8
    asked = (context, hydra.accept_typical, dict(cuda_graph=False, compile=True))
    drawn = (context, hydra.accept_sampling, dict(cuda_graph=False, compile=False))
    assert code == 0 and heard == [
        (1, *asked), (5, *asked), (5, *drawn), (64, *asked), (64, *drawn)]


def test_lab_compiles_and_records_before_the_clock_runs(monkeypatch):
    """A step for each number of slots that is read comes before the steps that are timed."""
    seen, step = [], hydra.Decoder.step

    def recorded(decoder, *args):
        result = step(decoder, *args)
        seen.append(decoder.cache.slots_read)
        return result

    monkeypatch.setattr(hydra.Decoder, "step", recorded)
    model = base("llama", max_position_embeddings=600)
    settings = SimpleNamespace(cuda_graph=False, max_new_tokens=60)
    prompts = torch.tensor(random_prompts(1, 500)).split(1)
    heads, tree = make_heads("hydra", model), hydra.build_tree(SEVEN)
    out = decode_all(settings, model, prompts, 560, heads, tree, None)
    timed = seen[-len(out.emitted[0]):]
    untimed = seen[:-len(timed)]
    assert {*untimed} == {*timed} == {512, 567}


def test_lab_draws_the_same_in_every_run():
    model = base("llama")
    settings = SimpleNamespace(cuda_graph=False, max_new_tokens=20)
    prompts = torch.tensor(random_prompts(2, 3, 3)).split(1)
    rule = partial(hydra.accept_sampling, temperature=1.0)
    runs = [decode_all(settings, model, prompts, 30, None, hydra.build_tree([]), rule)
            for _ in range(2)]
    assert runs[0].new_tokens == runs[1].new_tokens
    assert runs[0].new_tokens[0] != runs[0].new_tokens[1]


GIVEN = ["--model", "{folder}", "--heads", "{folder}/heads"]


@pytest.mark.parametrize("args, message", [
    (["--model", "{folder}"], "--train TEXT"),
    (GIVEN, "--prompts FILE"),
    (["--model", "{folder}", "--train", "{text}"], "--save FOLDER"),
    (["--heads", "{folder}/none", "--prompts", "{prompts}"], "cannot load draft heads"),
    ([*GIVEN, "--prompts", "{folder}/none"], "No such file"),
    ([*GIVEN, "--prompts", "{prompts}"], "must lie in 1 .. 128"),
    (["--num-prompts", "0"], "--num-prompts"),
    (["--accept", "typical", "--temperature", "-1"], "temperature=-1.0 must"),
    (["--model", "{folder}", "--train", "{prompts}", "--save", "x"], "held-out tokens"),
])
def test_lab_refuses_in_one_line(args, message, folder, prompt_file, text_file, lab, monkeypatch):
    monkeypatch.setattr(hydra, "make_heads", lambda *_, **__: pytest.fail("it trains"))
    names = dict(folder=folder, text=text_file, prompts=prompt_file)
    code, out, err = lab(*(arg.format(**names) for arg in args))
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("test_hydra.py: ") and message in err[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Hand out and grade the exercises of hydra.py; "
                                     "the lab: compare draft heads, time steps. Tests: pytest.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--handout", action="store_true", help="print hydra.py without the answers")
    what.add_argument("--grade", metavar="FILE", help="print the points of a filled-in handout")
    parser.add_argument("--json", action="store_true", help="one JSON object, for an autograder")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS",
                        help="for each exercise, start-up included (default: 60)")
    what.add_argument("--compare", action="store_true", help="train the draft heads that are "
                      "missing, decode with all, print a table")
    what.add_argument("--steps", action="store_true", help="print what a decode step costs here; "
                      "without --model: with random weights of Vicuna-7B's shapes")
    both = parser.add_argument_group("for --compare and --steps")
    both.add_argument("--model", help="as for hydra.py")
    both.add_argument("--compile", action="store_true", help="pass the step through torch.compile")
    both.add_argument("--no-cuda-graph", action="store_const", const=False, dest="cuda_graph")
    add_compare_options(parser)
    timed = parser.add_argument_group("for --steps")
    timed.add_argument("--batches", type=int, nargs="+", default=[1], help="default: 1")
    timed.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 64],
                       help="nodes of the trees; default: 1 16 64")
    args = parser.parse_args(argv)
    if args.handout:
        print(handout(), end="")
        return 0
    if args.grade:
        return grade_file(args.grade, args.timeout, args.json)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    try:
        if args.compare:
            return compare(args)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, heads = hydra.load(args.model)[:2] if args.model else random_7b(device)
        print_steps(model, heads, args.batches, args.sizes, compile=args.compile,
                    cuda_graph=args.cuda_graph)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"test_hydra.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
