"""The error of a record that cannot be used."""

from alignvlm_jax.errors import UserError


class Refusal(UserError):
    """The reason why a record cannot be used; `kind` is a short category under which reasons are counted."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind
