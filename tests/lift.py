"""The mode that lifts float32 casts inside Hugging Face models lives in the package: `verify` needs it too."""

from __future__ import annotations

from trainwright.verification.lift import Float64 as Float64
