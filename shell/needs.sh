# Sourced by the recipes before setup.sh: goes to the project's folder, and says what is missing before gigabytes are installed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# need NAME WHAT: the variable NAME is set; WHAT says what it is.
need() {
  [ -n "${!1:-}" ] || { echo "error: $1 is not set; set it to $2" >&2; exit 2; }
}

# need_file NAME WHAT: .. and it is a file or folder that exists, or CHECKPOINT's name of one (open_clip:NAME:TAG, hf-hub:org/name, ..).
need_file() {
  need "$1" "$2"
  [[ -e ${!1} || ( $1 == CHECKPOINT && ${!1} == *?:?* ) ]] || { echo "error: $1=${!1}: no such file or folder; set it to $2" >&2; exit 2; }
}

# need_records NAME WHAT: .. and each part of the comma list is a file, folder, glob or prefix of records or manifests.
need_records() {
  local part parts; need "$1" "$2"
  [ ! -e "${!1}" ] || return 0
  IFS=, read -ra parts <<< "${!1}"
  for part in "${parts[@]}"; do
    compgen -G "$part" > /dev/null || compgen -G "$part*.rec" > /dev/null ||
      { echo "error: $1=${!1}: $part names no file; set it to $2" >&2; exit 2; }
  done
}

# newest_demo: the run of the demo that was trained last, if any; demo_data: DEMO_DATA, or the set that CHECKPOINT was trained on.
newest_demo() { ls -t logs/demo-*/log.jsonl 2>/dev/null | sed 's|/log.jsonl$||; q' || true; }
demo_data() {
  local own; own=$(sed -n 's|^ *"train_data": "\(.*\)/train",*$|\1|p' "$CHECKPOINT/settings.json" 2>/dev/null || true)
  [ -e "$own/retrieval.jsonl" ] || own=data/demo; echo "${DEMO_DATA:-$own}"; }
