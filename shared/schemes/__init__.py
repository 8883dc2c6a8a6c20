"""How each codec stores a tensor: `plain` (f32, bf16) and `blocks` (int8, int4).

`shared.codec` puts them behind one name each and is what everybody else uses.
"""
