"""The embedded pair as a laboratory: train by a method, attack, and look at what happened."""

import copy

import torch

from surgery import demo
from surgery.demo import train as recipe
from surgery.hub import resolve
from surgery.hub.remote import open_source
from surgery.train import blocks, feed, loop, network, perturb, presets, sources, tokens
from surgery.train.losses import answer_loss, answered_count
from surgery.train.moments import moments
from surgery.train.step import Step


class Laboratory:
    """Everything measured on held-out rows."""

    def __init__(self, aligned=("refusals", "benign", "lookalikes")):
        self.source = open_source(resolve("demo:aligned"))
        self.tokenizer = network.load_tokenizer(self.source)
        self.train = {
            "aligned": self.rows(*aligned),
            "harmful": self.rows("harmful"),
            "retain": self.rows("benign", "lookalikes", "refusals"),
        }
        self.held_out = {
            name: feed.padded(self.rows(f"{name}:held_out")[:128], 0)
            for name in ("harmful", "refusals", "benign")
        }

    def rows(self, *names):
        return [
            row
            for name in names
            for row in tokens.tokenise(self.tokenizer, sources.read_rows(f"demo:{name}"), 128).rows
        ]

    def model(self):
        return network.load_model(self.source, torch.float32).eval()

    def trained(self, method, **training):
        """The model with what was trained (an adapter folded in), and the terms of every step."""
        _, chosen = presets.from_preset(type(method), "small", training)
        torch.manual_seed(0)
        model = network.make_trainable(self.model(), method, chosen, label="demo:aligned", seed=0)
        used = {name: self.train[name] for name in method.sets()}
        history = loop.Run(method, model, feed.Feed(method.streams(used, 0), chosen.batch_size), chosen).fit()
        return (model if chosen.full else model.merge_and_unload()).eval(), history

    def attacked(self, model, steps, *, peak=5e-4):
        """A copy after plain LoRA training on compliant answers, as `surgery.demo.attack` does it."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            victim = inject_adapter_in_model(config, copy.deepcopy(model))
        lessons = recipe.examples(self.tokenizer, demo.data("harmful", "attack"))
        recipe.fit(victim, recipe.batches(lessons, 16, 0, 0), steps=steps, peak=peak, warmup=5)
        return victim

    def loss(self, model, name):
        """Nats per answered token."""
        batch = self.held_out[name]
        with torch.no_grad():
            return float(answer_loss(model, batch, count=answered_count([batch], Step(0, 1))))

    def kappa(self, model, name, block):
        """The condition number of the second moments of what a block (from 1) puts out on held-out answers."""
        batch, module = self.held_out[name], blocks.find(model).layers[block - 1]
        with torch.no_grad(), perturb.outputs([module]) as put_out:
            model(input_ids=batch.tokens, attention_mask=batch.attended, use_cache=False)
        return moments(put_out[module][batch.answered], Step(0, 1), centred=False).kappa

    def drift(self, before, after):
        """How far hidden states of refusals moved, relative to their size, averaged over layers and tokens."""
        old, new = self.states(before), self.states(after)
        return float(((new - old).norm(dim=-1).mean(-1) / old.norm(dim=-1).mean(-1)).mean())

    def states(self, model):
        batch = self.held_out["refusals"]
        with torch.no_grad():
            found = model(input_ids=batch.tokens, attention_mask=batch.attended, output_hidden_states=True)
        return torch.stack([state[batch.attended] for state in found.hidden_states[1:]])
