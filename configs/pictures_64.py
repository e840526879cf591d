"""The paper's model at 64 pixels on your own images or COCO, converted by mode prepare.

--mode=prepare --config=configs/pictures_64.py --config.prepare.source=SRC --config.data.path=OUT
"""

from configs import base, emoji_64


def get_config(args: str | None = None):
    """Arguments: semantics (text | class), the conditioning."""
    row = base.arguments(args, semantics="text")
    config = emoji_64.get_config()
    config.data.name = "tfds"
    config.data.semantics = row.semantics
    config.prepare.builder = "folder"
    return config
