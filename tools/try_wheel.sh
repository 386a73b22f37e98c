#!/bin/sh
# Tries a built wheel as its users will: an empty virtual environment, a folder outside the repository, a log of their
# own, and every command.
#
#     tools/try_wheel.sh dist/negfast-0.1.0-*.whl
set -eu
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --constraint "$constraints" "$wheel"
PATH="$folder/venv/bin:$PATH"

python - <<'END'
import csv, random

random.seed(0)
with open("items.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["sku", "title", "kinds"])
    table.writerows([f"s{i}", f'The "{i}", größer', "rot;blau" if i % 2 else "grün"] for i in range(120))
rows = sorted(
    (day, random.randrange(86_400), user, random.randrange(120)) for user in range(80) for day in range(40) for _ in "ab"
)
with open("log.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["customer", "sku", "when", "action"])
    for day, second, user, item in rows:
        hidden = random.random() < (0.6 if item % 4 == user % 4 else 0.1)
        table.writerow([f"Zoë {user}", f"s{item}", 1_760_000_000 + day * 86_400 + second, "hide" if hidden else "buy"])
END

set -x
negfast --version
negfast doctor
negfast prepare log.csv --user-column customer --item-column sku --time-column when --dislike action==hide \
    --items items.csv --item-id-column sku --item-text-column title --item-attributes "kinds:;" --codebook 16 --out data
negfast inspect data
negfast train --preset smoke --data data --out run --set sft.steps=4 --set sft.validate_every=4 --set grpo.steps=2
negfast inspect run
negfast eval run --split valid
negfast predict run --top 5 --out dislikes.parquet
python -c "
import pyarrow.parquet as p
t = p.read_table('dislikes.parquet')
assert t.column_names == ['user', 'rank', 'item', 'score'] and len(t) == 400, t
p.write_table(t.select(['user', 'item']), 'candidates.parquet')"
negfast score run candidates.parquet --out scored.parquet
negfast user-profiles run --attribute kinds --out profiles.parquet
negfast report run
negfast export run --out exported
ls data run exported
