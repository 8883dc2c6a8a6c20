"""How each codec stores a tensor: `plain` (f32, bf16), `blocks` (int8, int4), `ternary` and `sparse` (topk2).

`shared.codec` puts them behind one name each and is what everybody else uses.
"""
