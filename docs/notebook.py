# %% [markdown]
# # A LLaMA in a notebook
#
# Run the cells in VS Code, PyCharm or Jupyter (with jupytext), or all of them as a script:
# `python docs/notebook.py models/smollm2`. The default folder is the quickstart's.

# %%
import sys
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np

import llama_jax as lj

IN_JUPYTER = "ipykernel" in sys.modules  # then sys.argv is the kernel's
FOLDER = sys.argv[1] if sys.argv[1:] and not IN_JUPYTER else "runs/quickstart"

config, model = lj.load(FOLDER)
tokenizer = lj.load_tokenizer(FOLDER)

# %% [markdown]
# ## The weights
#
# A model is a tree of arrays. Their names are Meta's; their axes are [in…, out…].

# %%
print(f"{config.n_params:,} parameters, {config.n_layers} layers like this one:")
for name, weight in vars(model.layers[0]).items():
    if not name.startswith("_"):
        print(f"  {name:15} {weight.shape!s:16} deviation {weight[...].std():.4f}")

# %% [markdown]
# ## The next token
#
# `np.asarray` copies a result from the devices to a NumPy array.

# %%
PROMPT = "The sun rises in the east and sets in the"
forward = jax.jit(lj.forward, static_argnums=0)

prompt = tokenizer.encode(PROMPT, bos=tokenizer.add_bos)
tokens_BT = np.array([prompt])
logprobs_BTV = np.asarray(jax.nn.log_softmax(forward(config, model, tokens_BT)))

print(f"after {PROMPT!r}:")
for token in np.argsort(-logprobs_BTV[0, -1])[:5]:
    print(f"  {np.exp(logprobs_BTV[0, -1, token]):6.1%} {tokenizer.decode([*prompt, token])!r}")

# %% [markdown]
# ## Predictions of the earlier layers
#
# A model without its last layers is still a model. This figure shows the log-probability that each
# depth gives to the real next tokens (the 'logit lens').

# %%
depths = np.unique(np.linspace(1, config.n_layers, min(6, config.n_layers), dtype=int))
next_token_logprobs = []
for depth in depths:
    shallow = model._replace(layers=model.layers[:depth])
    logprobs_BTV = np.asarray(jax.nn.log_softmax(forward(config, shallow, tokens_BT)))
    logprobs_T1 = np.take_along_axis(logprobs_BTV[0, :-1], tokens_BT[0, 1:, None], axis=1)
    next_token_logprobs.append(logprobs_T1[:, 0])

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
image = axes.imshow(next_token_logprobs, aspect="auto", origin="lower")
axes.set_xticks(range(len(prompt) - 1), [repr(tokenizer.decode([i])) for i in prompt[1:]])
axes.set_yticks(range(len(depths)), [f"{depth} layers" for depth in depths])
figure.colorbar(image, label="log-probability [nats]")
figure.savefig("lens.png")

# %% [markdown]
# ## Text
#
# `complete` accepts a text, or a chat: `[{"role": "user", "content": "…"}]`.

# %%
START = "The llama on the hill"
print(START + lj.complete(config, model, tokenizer, START, max_new_tokens=24))
warm = lj.Sampling(temperature=0.8, top_p=0.95)
for seed in range(2):
    generated = lj.complete(
        config, model, tokenizer, PROMPT, max_new_tokens=24, sampling=warm, seed=seed
    )
    print(f"--- seed {seed}\n{PROMPT}{generated}")

# %% [markdown]
# ## A few steps of training
#
# This cell calls the same train step as `llama-jax train`. A run reads its batches from the folders
# that its configuration names; this cell builds one batch from a text.
# `lj.train(lj.load_config("configs/quickstart.yaml"))` does a complete run in one call.

# %%
TEXT = "The llama on the hill wears a blue hat, and its house is made of straw.\n"
STEPS = 20

ids = tokenizer.encode(TEXT, bos=True, eos=True)[: config.context + 1]
T = len(ids) - 1
run = lj.Config(
    model=replace(config, param_dtype="float32"),
    data={"mixture": {"unused": 1}, "seq_len": T, "batch_size": 1},
    optimizer={"peak_lr": 1e-3, "warmup_steps": 2},
    training={"init_from": FOLDER, "out": "unused", "steps": STEPS},
)
tuned, opt_state = lj.initial_state(run)

rows_AB = np.array([[ids]])  # one micro-batch of one row
positions = np.arange(T).reshape(1, 1, T)
batch = lj.Batch(rows_AB[..., :-1], rows_AB[..., 1:], positions, segments=None)
losses = []
for step in range(STEPS):
    tuned, opt_state, metrics = lj.train_step(run, tuned, opt_state, batch, step)
    losses.append(float(metrics.loss))
print("loss [nats per token]:", " ".join(f"{loss:.2f}" for loss in losses))

# %%
generated = lj.complete(run.model, tuned, tokenizer, START, max_new_tokens=24, stops=["\n"])
print(START + generated)

# %% [markdown]
# `lj.save_model("models/mine", run.model, tuned, tokenizer)` writes a model folder for `lj.load`
# and for every command of `llama-jax`.
