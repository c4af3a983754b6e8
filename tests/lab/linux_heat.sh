#!/bin/sh
# linux_heat.sh MEMORY KEEP ANONYMOUS FILE [OPTION...]: what a Linux guest gives back, inside the machine; its shell is
# busybox's. A guest of MEMORY, in whole G, loads the module heat_hint and runs heat_load with so many MiB: a row of a Markdown table for
# each transport and backing. The host memory of each, over time, is left in /tmp/heat-TRANSPORT-BACKING.log. OPTIONs are
# cppvmm-boot's. CPPVMM_HEAT_ORDER: the order of the smallest blocks that Linux reports, else what it has by itself.
# CPPVMM_HEAT_TRANSPORTS, CPPVMM_HEAT_BACKINGS: which of them.
set -u

memory=$1
load="keep=$2 anonymous=$3 file=$4"
shift 4
mkdir -p /tmp/root/bin /tmp/root/dev /tmp/root/sys
cp /bin/busybox /tmp/root/bin/
cp /guests/heat_hint.ko /guests/heat_load /tmp/root/
cat >/tmp/root/init <<INIT
#!/bin/busybox sh
/bin/busybox mount -t sysfs sys /sys
if /bin/busybox insmod /heat_hint.ko; then
  order=${CPPVMM_HEAT_ORDER:-}
  parameter=/sys/module/page_reporting/parameters/page_reporting_order
  if [ "\$order" ]; then echo "\$order" >\$parameter; fi
  /heat_load $load
fi
/bin/busybox reboot -f
INIT
chmod +x /tmp/root/init
(cd /tmp/root && find . | cpio -o -H newc 2>/dev/null) >/tmp/initrd

figure() { sed -n "s/^  \"$1\": \(.*[^,]\),*$/\1/p" /tmp/figures; }
# Of the line with that field.
said() { sed -n "s/.*cppvmm: {.*\"$1.*\"$2\": \([^,}]*\).*/\1/p" /tmp/console; }
# Bytes at the answer of that number.
bytes_at() { awk -v number="$2" '/answer$/ && ++seen == number { print $2 }' "$1"; }

echo "| host and guest | transport | backing | host memory before, full, after [MiB] | given back of the growth | the answers grew by [MiB] | hints | refused | wrong words | answers with data |"
echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
failed=0
for transport in ${CPPVMM_HEAT_TRANSPORTS:-kernel split user}; do
  for backing in ${CPPVMM_HEAT_BACKINGS:-anonymous memfd hugetlb}; do
    log=/tmp/heat-$transport-$backing.log
    # As many huge pages as all of the guest's memory takes.
    if [ "$backing" = hugetlb ]; then echo $((${memory%G} * 512)) >/proc/sys/vm/nr_hugepages; fi
    /cppvmm-boot --memory "$memory" --backing "$backing" --hypercalls "$transport" --kernel /vmlinuz --initrd /tmp/initrd \
      --append 'console=ttyS0 quiet panic=-1 clearcpuid=cx16 reboot=kbd' --audit --json - --host-memory-log "$log" "$@" \
      >/tmp/figures 2>/tmp/console
    status=$?
    echo 0 >/proc/sys/vm/nr_hugepages
    if grep -qE 'KVM does not forward|KVM has no Hyper-V' /tmp/console; then continue; fi
    if [ $status != 0 ] || [ "$(said module\":\ \"heat_load\" wrong_words)" != 0 ] ||
      [ "$(said wrong_words\" wrong_kept_words)" != 0 ] || [ -z "$(bytes_at "$log" 3)" ]; then
      echo "linux_heat.sh: $transport, $backing: status $status" >&2
      cat /tmp/console >&2
      failed=1
      continue
    fi
    awk -v row="$(uname -r) | $transport | $backing" \
      -v before="$(bytes_at "$log" 1)" -v full="$(bytes_at "$log" 2)" -v after="$(bytes_at "$log" 3)" \
      -v answer_full="$(said 'at": "full"' answered_pages)" -v answer_after="$(said 'at": "after"' answered_pages)" \
      -v hints="$(said 'at": "after"' calls)" -v refused="$(said 'at": "after"' refused)" \
      -v wrong="$(said module\":\ \"heat_load\" wrong_words)" -v unsound="$(figure unsound_answers)" \
      'BEGIN { mib = 1048576; printf "| %s | %d, %d, %d | %d of %d MiB: %.1f %% | %d | %d | %d | %d | %d |\n", row,
        before / mib, full / mib, after / mib, (full - after) / mib, (full - before) / mib,
        100 * (full - after) / (full - before), (answer_after - answer_full) / 256, hints, refused, wrong, unsound }' || failed=1
  done
done
exit $failed
