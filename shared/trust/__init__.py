"""Who may speak and who can read: keys, memberships, sealed messages and sealed chunks.

    signing.py     what exactly is signed: domain and length-prefixed parts
    membership.py  the authority's word that keys belong to a name; the list of those taken back
    grant.py       what a site is handed when it is admitted, and each time it is renewed
    document.py    requests and grants as JSON
    kit.py         the folder of keys and memberships on one machine
    envelope.py    one control message, signed and encrypted
    replay.py      counters that rise over restarts, at the sender and at the receiver
    witness.py     who has seen which history: heads of the audit chain, signed and counter-signed
    payload.py     chunks under a key per transfer
    guard.py       what links use: seal and open; one open, one sealed

All primitives are the `cryptography` package's: Ed25519, HPKE (RFC 9180), HKDF-SHA256, ChaCha20-Poly1305.
"""
