"""The arithmetic on packed tokens: plain torch functions that say what each kernel means."""
