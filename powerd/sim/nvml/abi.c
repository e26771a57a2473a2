/* Sizes and offsets of every NVML structure served, as a table that a test compares with the Python bindings. */
#include "sim.h"

struct row { const char *structure, *field; uint32_t offset, size; };
#define S(type) {#type, "", 0, sizeof(type)}
#define F(type, field) {#type, #field, offsetof(type, field), sizeof(((type *)0)->field)}

static const struct row rows[] = {
    S(nvml_utilization), F(nvml_utilization, gpu), F(nvml_utilization, memory),
    S(nvml_memory), F(nvml_memory, total), F(nvml_memory, free), F(nvml_memory, used),
    S(nvml_memory_v2), F(nvml_memory_v2, version), F(nvml_memory_v2, total), F(nvml_memory_v2, reserved),
    F(nvml_memory_v2, free), F(nvml_memory_v2, used),
    S(nvml_bar1_memory), F(nvml_bar1_memory, bar1Total), F(nvml_bar1_memory, bar1Free), F(nvml_bar1_memory, bar1Used),
    S(nvml_pci_info), F(nvml_pci_info, busIdLegacy), F(nvml_pci_info, domain), F(nvml_pci_info, bus), F(nvml_pci_info, device),
    F(nvml_pci_info, pciDeviceId), F(nvml_pci_info, pciSubSystemId), F(nvml_pci_info, busId),
    S(nvml_pci_info_v2), F(nvml_pci_info_v2, busId), F(nvml_pci_info_v2, domain), F(nvml_pci_info_v2, bus),
    F(nvml_pci_info_v2, device), F(nvml_pci_info_v2, pciDeviceId), F(nvml_pci_info_v2, pciSubSystemId),
    F(nvml_pci_info_v2, reserved0), F(nvml_pci_info_v2, reserved1), F(nvml_pci_info_v2, reserved2), F(nvml_pci_info_v2, reserved3),
    S(nvml_pci_info_ext), F(nvml_pci_info_ext, version), F(nvml_pci_info_ext, domain), F(nvml_pci_info_ext, bus),
    F(nvml_pci_info_ext, device), F(nvml_pci_info_ext, pciDeviceId), F(nvml_pci_info_ext, pciSubSystemId),
    F(nvml_pci_info_ext, baseClass), F(nvml_pci_info_ext, subClass), F(nvml_pci_info_ext, busId),
    S(nvml_process_info), F(nvml_process_info, pid), F(nvml_process_info, usedGpuMemory), F(nvml_process_info, gpuInstanceId),
    F(nvml_process_info, computeInstanceId),
    S(nvml_value), F(nvml_value, dVal), F(nvml_value, uiVal), F(nvml_value, ulVal), F(nvml_value, ullVal), F(nvml_value, sllVal),
    F(nvml_value, siVal), F(nvml_value, usVal),
    S(nvml_field_value), F(nvml_field_value, fieldId), F(nvml_field_value, scopeId), F(nvml_field_value, timestamp),
    F(nvml_field_value, latencyUsec), F(nvml_field_value, valueType), F(nvml_field_value, nvmlReturn), F(nvml_field_value, value),
    S(nvml_power_value_v2), F(nvml_power_value_v2, version), F(nvml_power_value_v2, powerScope), F(nvml_power_value_v2, powerValueMw),
    S(nvml_process_utilization), F(nvml_process_utilization, pid), F(nvml_process_utilization, timeStamp),
    F(nvml_process_utilization, smUtil), F(nvml_process_utilization, memUtil), F(nvml_process_utilization, encUtil),
    F(nvml_process_utilization, decUtil),
    S(nvml_temperature), F(nvml_temperature, version), F(nvml_temperature, sensorType), F(nvml_temperature, temperature),
    S(nvml_margin_temperature), F(nvml_margin_temperature, version), F(nvml_margin_temperature, marginTemperature),
    S(nvml_c2c_mode_info), F(nvml_c2c_mode_info, isC2cEnabled),
    S(nvml_event_data), F(nvml_event_data, device), F(nvml_event_data, eventType), F(nvml_event_data, eventData),
    F(nvml_event_data, gpuInstanceId), F(nvml_event_data, computeInstanceId),
    S(nvml_violation_time), F(nvml_violation_time, referenceTime), F(nvml_violation_time, violationTime),
    S(nvml_gpm_support), F(nvml_gpm_support, version), F(nvml_gpm_support, isSupportedDevice),
};

SIM_API uint32_t powerd_sim_abi_rows(void) { return sizeof rows / sizeof *rows; }
SIM_API const struct row *powerd_sim_abi_row(uint32_t index) { return index < powerd_sim_abi_rows() ? &rows[index] : 0; }
