"""Imported while Python starts if TRANSFORMERS_KT is set, by the .pth file beside it: `import transformers` will then
import transformers_kt too.

It imports nothing itself, for most programs never import transformers; and no error leaves it, for it is no business of
theirs.
"""

import os
import sys


def _say(what):
    if sys.stderr is not None:
        print(f"transformers_kt: {what}", file=sys.stderr)


class _BeforeTransformers:
    """A finder that finds nothing. When it is asked for transformers it imports transformers_kt, and is gone."""

    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            sys.meta_path.remove(self)
            try:
                import transformers_kt  # noqa: F401
            except Exception as error:
                _say(f"TRANSFORMERS_KT=1 is without effect: {error}")
        return None


_wanted = os.environ["TRANSFORMERS_KT"]
if _wanted == "1":
    sys.meta_path.insert(0, _BeforeTransformers())
elif _wanted != "0":
    _say(f"TRANSFORMERS_KT={_wanted} is without effect: 1 (on) and 0 (off) are accepted")
