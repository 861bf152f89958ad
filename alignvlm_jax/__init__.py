"""AlignVLM in JAX.

    import alignvlm_jax
    reader = alignvlm_jax.load("runs/demo/checkpoint")
    print(reader.ask("page.png", "What is the total?"))

The command line is `alignvlm`; see `alignvlm --help`.
"""

__version__ = "0.1.0"
__all__ = ["UserError", "load"]

from alignvlm_jax.errors import UserError


def load(checkpoint, **options):
    """Loads the trained model in `checkpoint` (a workdir, an exported folder, or "nano") for questions about images.

    The options and the returned `Reader` are described in `inference.reader.load`.
    """
    # Import here, because `import alignvlm_jax` and `alignvlm --help` must not wait for jax.
    from alignvlm_jax.inference.reader import load as load_reader

    return load_reader(checkpoint, **options)
