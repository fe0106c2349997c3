"""Rows of pictures and captions to examples: all that can be wrong with them is found here, before heavy work."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from dynlora_cli.data.encode import Encoder
from dynlora_cli.data.examples import Draft, Example, Located
from dynlora_cli.data.forms import Captioned
from dynlora_cli.errors import DataError
from dynlora_cli.tasks.images.example import Pictured
from dynlora_cli.tasks.images.judge import DenoisingJudge
from dynlora_cli.tasks.images.picture import Picture
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.tasks.images.studio import Studio


class PictureEncoder(Encoder):
    """Looks at pictures, and makes tokens of captions.

    Args:
        tokenizer, train_on, max_length: as of `Encoder`.
        studio: will make latents and conditions.
        judge: of the examples.
        caption: of rows that have none; None: there must be none such.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: str,
        max_length: int,
        studio: Studio,
        judge: DenoisingJudge,
        caption: str | None,
    ) -> None:
        longest = min(max_length, int(tokenizer.model_max_length))
        super().__init__(tokenizer, train_on, longest)
        self.studio, self.judge, self.caption = studio, judge, caption
        self.small = 0

    def encode(self, rows: list[Located]) -> list[Draft]:
        drafts = []
        for row in rows:
            form = row.form
            assert isinstance(form, Captioned)
            picture = Picture.find(form.image, row.home, row.place)
            self.small += min(picture.size) < self.studio.side
            caption = form.caption if form.caption is not None else self.caption
            if caption is None:
                raise DataError(
                    f"{row.place}: the picture has no caption",
                    "write one as `text` (or NAME.txt beside NAME.png), or one for all such rows as model.caption",
                )
            # Whichever rows show a picture, it lies on one side of a split.
            drafts.append(Draft([], [], picture.digest.hex(), picture=(picture, caption)))
        ids = self._cut([draft.picture[1] for draft in drafts], drafts)
        for draft, tokens in zip(drafts, ids, strict=True):
            draft.ids = tokens or [int(cast("Any", self.tokenizer.pad_token_id))]
        return drafts

    def example(self, draft: Draft, row: int) -> Pictured:
        picture, caption = draft.picture
        ids = array("i", draft.ids[: self.max_length])
        return Pictured(ids, caption, picture, row, self.studio, self.judge, draft.confidence)

    def settle(self, examples: Sequence[Example], prompts: Sequence[bytes]) -> None:  # noqa: ARG002
        self.studio.expect([(one.caption, one.picture) for one in cast("Sequence[Pictured]", examples)])

    def notes(self, template: str) -> list[str]:  # noqa: ARG002
        if not self.small:
            return []
        small, side = counted(self.small, "picture"), self.studio.side
        return [f"{small} smaller than {side} pixels a line (model.resolution): made larger, which blurs them"]
