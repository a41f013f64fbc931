"""Schemathesis reads this file: what makes requests get further than a made-up model's name would let them."""

import schemathesis


@schemathesis.hook
def map_body(context, body):
    """Half of the requests are for the model that is there."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 2:
        return {name: value for name, value in body.items() if name != "model"}
    return body
