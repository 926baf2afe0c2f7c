"""Tests, in folders that mirror those of the code; `helpers` is what several of them call, `programs` what they run."""
