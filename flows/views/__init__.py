"""Questions of a data team as DuckDB views over runs, and a connection that has them."""

from .database import connect, find_questions, make_sql, write_database

__all__ = ["connect", "find_questions", "make_sql", "write_database"]
