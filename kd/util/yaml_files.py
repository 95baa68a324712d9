"""YAML as recipes and run folders hold it, read so that nothing in it is dropped, hangs or costs the process."""

from __future__ import annotations

from pathlib import Path

import yaml

from kd.util.errors import UserError


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """PyYAML's safe loader, which refuses a key that stands twice and a value that holds itself."""

    def construct_document(self, node):
        self.deep_construct = True  # or a value that holds itself is built
        return super().construct_document(node)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str):
    """What YAML text holds. Raises yaml.YAMLError, whatever is wrong with it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, a 40th of January; 3,000 brackets
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: Path) -> dict:
    """A YAML file's fields.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if path.exists() and not path.is_file():  # a pipe would never end
        raise UserError(f"{path} is no file")
    try:
        content = load_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged or no config: it holds no fields but {str(content)[:60]!r}")
    return content
