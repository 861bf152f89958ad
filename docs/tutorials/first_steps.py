# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First steps
#
# This notebook loads the trained nano model, asks it about a page, and shows the page as the language model reads it.
# The model comes with the package. Nothing is downloaded, and a CPU is enough.
#
# The source is `docs/tutorials/first_steps.py`. Open it in Jupyter with
# [jupytext](https://jupytext.readthedocs.io), or run the cells in an editor that knows the percent format.

# %% [markdown]
# ## Load a model
#
# `load` takes the working directory of a training run, an exported folder, or `"nano"`.

# %%
import alignvlm_jax

reader = alignvlm_jax.load("nano")

# %% [markdown]
# ## Draw a page
#
# The demo's documents are drawn by the package: receipts, forms, tables and charts, with questions and answers. This
# receipt is from the held-out split: the model has never seen its values.

# %%
from alignvlm_jax.data.synthetic import draw_document

document = draw_document(seed=0, split="heldout", index=2)
document.image.resize([4 * side for side in document.image.size])

# %% [markdown]
# ## Ask
#
# An image is a path, the bytes of an image file, or a PIL image.

# %%
reader.ask(document.image, "How much is the total?")

# %% [markdown]
# `ask_many` answers many questions about one page, which the model encodes only once. `ask_batch` answers questions
# about different pages. The model is small and makes mistakes, so compare its answers with the page.

# %%
answers = reader.ask_many(document.image, document.questions)
for question, answer, expected in zip(document.questions, answers, document.answers):
    verdict = "right" if answer == expected else f"wrong: the page says {expected}"
    print(f"{question:28}{answer:12}{verdict}")

# %% [markdown]
# ## See what the language model sees
#
# ALIGN turns each patch of the page into a mixture of the language model's own words. The inspector shows these words.
# Point at a patch to read them, or type a word to see where it is. The answer's view shows the patches that it depends
# on most.

# %%
import html

from IPython.display import HTML

from alignvlm_jax.inspector import inspect_image, page

inspection = inspect_image(
    reader,
    document.image,
    ["How much is the total?"],
    name="receipt.png",
    checkpoint="nano",
    progress=False,
)
text = html.escape(page.render(inspection.to_json(), title="receipt.png"))
HTML(f'<div><iframe srcdoc="{text}" width="100%" height="900"></iframe></div>')

# %% [markdown]
# `alignvlm inspect --checkpoint nano PAGE.png --question "..." --out page.html` writes the same page to a file.
#
# ## Next
#
# - [The inspector](../inspector.md) explains the page above and its numbers.
# - [Fine-tune on your own documents](../finetune.md) goes from a JSONL file to a trained model.
