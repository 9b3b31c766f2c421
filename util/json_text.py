"""Reading of JSON that anyone may have written."""

import json


def parse_json(text: str | bytes) -> object:
    """Parse JSON; bytes are UTF-8, 16 or 32, with or without a byte order mark.

    Raises:
        ValueError: it is no JSON that Python can hold. Its numbers are too long or its lists are
            nested too deeply for `json.loads` to raise an error of JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
