#include "mp_table.hpp"

#include <initializer_list>
#include <string_view>
#include <utility>

namespace cppvmm::boot {
namespace {

// Chapter 4 of the specification.
constexpr std::size_t pointer_bytes = 16;
constexpr std::size_t pointer_checksum = 10;
constexpr std::size_t table_length = 4;
constexpr std::size_t table_checksum = 7;
constexpr std::size_t table_entries = 34;
constexpr std::uint8_t revision = 4; // 1.4
constexpr std::uint32_t local_apic_address = 0xFEE0'0000;
constexpr std::uint32_t io_apic_address = 0xFEC0'0000;
constexpr std::uint8_t local_apic_version = 0x14; // KVM's: arch/x86/kvm/lapic.c, APIC_VERSION
constexpr std::uint8_t io_apic_version = 0x11;    // arch/x86/kvm/ioapic.h, IOAPIC_VERSION_ID
constexpr std::uint8_t isa_bus = 0;
constexpr std::uint8_t isa_interrupts = 16;
constexpr std::uint8_t cascade_interrupt = 2; // of the second PIC: no device has it

enum EntryType : std::uint8_t { processor, bus, io_apic, io_interrupt, local_interrupt };
enum InterruptType : std::uint8_t { vectored, nmi, smi, external };

class Table {
public:
  void put(std::initializer_list<std::uint8_t> values) {
    for (const auto value : values)
      bytes_.push_back(std::byte{value});
  }
  void put16(std::uint16_t value) { put({static_cast<std::uint8_t>(value), static_cast<std::uint8_t>(value >> 8)}); }
  void put32(std::uint32_t value) {
    put16(static_cast<std::uint16_t>(value));
    put16(static_cast<std::uint16_t>(value >> 16));
  }
  void put(std::string_view text) {
    for (const char character : text)
      bytes_.push_back(static_cast<std::byte>(character));
  }
  void set16(std::size_t at, std::size_t value) {
    bytes_[at] = static_cast<std::byte>(value);
    bytes_[at + 1] = static_cast<std::byte>(value >> 8);
  }
  /// Sets the byte at `checksum` so that all of [first, first + count) sum up to 0.
  void seal(std::size_t first, std::size_t count, std::size_t checksum) {
    std::uint8_t sum = 0;
    for (std::size_t i = first; i < first + count; ++i)
      sum = static_cast<std::uint8_t>(sum + std::to_integer<std::uint8_t>(bytes_[i]));
    bytes_[checksum] = static_cast<std::byte>(0x100 - sum);
  }
  [[nodiscard]] std::size_t size() const { return bytes_.size(); }
  [[nodiscard]] std::vector<std::byte> take() { return std::move(bytes_); }

private:
  std::vector<std::byte> bytes_;
};

} // namespace

std::vector<std::byte> make_mp_table(std::uint64_t address, std::uint32_t cpus) {
  Table table;
  table.put("_MP_");
  table.put32(static_cast<std::uint32_t>(address + pointer_bytes));
  table.put({1, revision, 0, 0, 0, 0, 0, 0}); // one paragraph; a configuration table is there; virtual wire mode
  table.seal(0, pointer_bytes, pointer_checksum);

  table.put("PCMP");
  table.put16(0);
  table.put({revision, 0});
  table.put("CPPVMM  ");     // 8 characters
  table.put("BOOT        "); // 12 characters
  table.put32(0);
  table.put16(0);
  table.put16(0);
  table.put32(local_apic_address);
  table.put32(0);

  const auto io_apic_id = static_cast<std::uint8_t>(cpus);
  std::size_t entries = 0;
  for (std::uint32_t id = 0; id < cpus; ++id, ++entries) {
    constexpr std::uint8_t enabled = 1;
    constexpr std::uint8_t boot_processor = 2;
    table.put({processor, static_cast<std::uint8_t>(id), local_apic_version,
               static_cast<std::uint8_t>(id == 0 ? enabled | boot_processor : enabled)});
    table.put32(0); // signature and feature flags: CPUID has them
    table.put32(0);
    table.put32(0);
    table.put32(0);
  }
  table.put({bus, isa_bus});
  table.put("ISA   "); // 6 characters
  table.put({io_apic, io_apic_id, io_apic_version, 1});
  table.put32(io_apic_address);
  entries += 2;
  for (std::uint8_t line = 0; line < isa_interrupts; ++line) {
    if (line == cascade_interrupt) continue;
    table.put({io_interrupt, vectored, 0, 0, isa_bus, line, io_apic_id, line});
    ++entries;
  }
  table.put({local_interrupt, external, 0, 0, isa_bus, 0, 0, 0});
  table.put({local_interrupt, nmi, 0, 0, isa_bus, 0, 0xFF, 1});
  entries += 2;
  table.set16(pointer_bytes + table_length, table.size() - pointer_bytes);
  table.set16(pointer_bytes + table_entries, entries);
  table.seal(pointer_bytes, table.size() - pointer_bytes, pointer_bytes + table_checksum);
  return table.take();
}

} // namespace cppvmm::boot
