"""What reads run directories: tables, figures and the page of `python -m hamu_jax.report`.

May import `config` and what is below it; trains nothing and loads no data.
"""
