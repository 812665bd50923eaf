"""The literature's tables, measured: one module per table, each a `TABLE` of rows.

`rows` says what tables and rows are, `measure` measures a row, `record` keeps what was measured and `page` shows it
beside what was published.
"""

from dcgan.reproduce import cifar10, clustering, image_quality, mnist, svhn
from dcgan.reproduce.rows import Table

TABLES: dict[str, Table] = {
    "cifar10": cifar10.TABLE,
    "svhn": svhn.TABLE,
    "clustering": clustering.TABLE,
    "mnist": mnist.TABLE,
    "image_quality": image_quality.TABLE,
}
