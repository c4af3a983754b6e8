#!/bin/sh
# linux_table.sh: what the answer is worth to Linux, inside the machine; its shell is busybox's. A guest of 2 GiB boots,
# loads the module zeroed_memory, and ends: a row of a Markdown table for each transport and backing. Beside the pages that
# the answer reports are those that it would, were it known by blocks of 2 MiB only what is touched.
set -u

mkdir -p /tmp/root/bin /tmp/root/dev
cp /bin/busybox /tmp/root/bin/
cp /guests/zeroed_memory.ko /tmp/root/
cat >/tmp/root/init <<'INIT'
#!/bin/busybox sh
/bin/busybox insmod /zeroed_memory.ko
/bin/busybox reboot -f
INIT
chmod +x /tmp/root/init
(cd /tmp/root && find . | cpio -o -H newc 2>/dev/null) >/tmp/initrd

figure() { sed -n "s/^  \"$1\": \(.*[^,]\),*$/\1/p" /tmp/figures; }
answer() { sed -n "s/.*cppvmm: {.*\"$1\": \([^,}]*\).*/\1/p" /tmp/console; }

echo "| host and guest | transport | backing | reported pages with data | of the guest's free pages | pages reported | by blocks of 2 MiB | ranges | survey |"
echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
failed=0
for transport in kernel split user; do
  for backing in anonymous memfd; do
    /cppvmm-boot --memory 2G --backing $backing --hypercalls $transport --kernel /vmlinuz --initrd /tmp/initrd \
      --append 'console=ttyS0 quiet panic=-1 clearcpuid=cx16 reboot=kbd' --audit --json - \
      >/tmp/figures 2>/tmp/console
    status=$?
    if grep -qE 'KVM does not forward|KVM has no Hyper-V' /tmp/console; then continue; fi
    # What the guest found is the row's; that it found data is a failure.
    if [ "$(answer data_pages)" != 0 ]; then failed=1; fi
    if [ $status != 0 ] || [ "$(answer status)" != 0 ]; then
      echo "linux_table.sh: $transport, $backing: status $status" >&2
      cat /tmp/console >&2
      failed=1
      continue
    fi
    awk -v row="$(uname -r) | $transport | $backing | $(answer data_pages) by the guest, $(figure unsound_pages) by the audit" \
      -v reported="$(answer free_reported_pages)" -v buddy="$(answer buddy_pages)" -v cached="$(answer cached_pages)" \
      -v exact="$(figure reported_pages)" -v by_blocks="$(figure reported_pages_by_2_mib)" \
      -v ranges="$(answer ranges)" -v survey="$(figure survey_us)" \
      'BEGIN { printf "| %s | %d of %d: %.1f %% | %d | %d | %d | %.1f ms |\n", row, reported, buddy + cached,
        100 * reported / (buddy + cached), exact, by_blocks, ranges, survey / 1000 }'
  done
done
exit $failed
