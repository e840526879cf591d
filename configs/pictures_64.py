"""The paper's model on pictures of your own, or COCO's, as mode prepare makes them: 64 pixels.

--mode=prepare --config=configs/pictures_64.py --config.prepare.source=SRC --config.data.path=OUT
"""

from configs import base, emoji_64


def get_config(args: str | None = None):
    """Arguments: semantics (text | class), what the pictures are made from."""
    row = base.arguments(args, semantics="text")
    config = emoji_64.get_config()
    config.data.name = "tfds"
    config.data.semantics = row.semantics
    config.prepare.builder = "folder"
    return config
